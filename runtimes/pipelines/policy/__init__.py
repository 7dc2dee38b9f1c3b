"""Game policies: recorded frames in, controller inputs out."""

from runtimes.pipelines.policy.pipeline import PolicyPipeline

PIPELINES = {"policy": PolicyPipeline}
