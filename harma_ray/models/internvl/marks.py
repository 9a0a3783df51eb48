"""What marks the parts of a talk in InternVL's texts, its first words, and labels of tokens; imports nothing."""

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
SYSTEM_PROMPT = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
"""What InternVL2.5 is told first, unless a talk begins with a system turn of its own."""
IGNORED = -100
"""The label of a token that is not supervised."""
