"""The frozen context encoder of `strategy`: a dialogue's text in, its vector out."""

from runtimes.texts import TextPipeline


class EncoderPipeline(TextPipeline):
    tokenizer = "context_tokenizer.json"
    max_tokens = "max_tokens"


PIPELINE = EncoderPipeline
