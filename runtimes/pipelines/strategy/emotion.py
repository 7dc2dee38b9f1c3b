"""The frozen emotion classifier of `strategy`: a turn's text in, seven logits out."""

from runtimes.text_pipeline import TextPipeline


class EmotionPipeline(TextPipeline):
    """The vector of an answer is seven logits."""

    tokenizer = "emotion_tokenizer.json"
    max_tokens = "turn_tokens"
