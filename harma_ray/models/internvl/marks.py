"""What marks the parts of a talk in InternVL's texts, and labels of tokens; imports nothing."""

IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    IMAGE_START,
    IMAGE_END,
    IMAGE_TOKEN,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""Added to a tokenizer that has them not, in this order."""
IGNORED = -100
"""The label of a token that is not supervised."""
