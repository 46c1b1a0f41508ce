"""Fine-tune a model on conversations with LoRA, then ask it something; needs the extra [lora].

    python examples/chat_lora.py runs/q chat.jsonl runs/q-chat "What is a cat?" [MAX_TOKENS]

A record of chat.jsonl is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
"""

from __future__ import annotations

import sys

import unmask

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""For a base model, whose tokenizer has no template."""


def main(model: str, data: str, output: str, question: str, max_tokens: str = "1000000", **settings: object) -> str:
    """The answer of the fine-tuned model. The adapter is merged: the folder is an ordinary checkpoint."""
    lm = unmask.load(model)
    if lm.tokenizer.chat_template is None:
        lm.tokenizer.chat_template = TEMPLATE
    lm = unmask.adapt(
        lm, data, output_dir=output, max_tokens=int(max_tokens), lora_rank=16, learning_rate=1e-4, **settings
    )
    prompt = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return lm.generate(prompt, max_new_tokens=64).texts[0]


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    print(main(*sys.argv[1:]))
