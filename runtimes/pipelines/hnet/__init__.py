"""The byte language model H-Net: text in, the scores and boundaries of its bytes out."""

from runtimes.pipelines.hnet.scoring import HNetPipeline
from runtimes.pipelines.hnet.step import HNetStepPipeline

PIPELINES = {"hnet": HNetPipeline, "hnet_step": HNetStepPipeline}
