"""The frozen context encoder of `strategy`: a dialogue's text in, its vector out."""

from runtimes.text_pipeline import TextPipeline


class EncoderPipeline(TextPipeline):
    """The vector of an answer is the context's."""

    tokenizer = "context_tokenizer.json"
    max_tokens = "max_tokens"
