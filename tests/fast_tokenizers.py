"""Small byte-level tokenizers that begin and end texts as those of known backbones do."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<bos>", "<eos>"
#: What stands around a text, by whose tokenizer does so.
FRAMES = {
    "llama 3": f"{BEGIN} $A",
    "gpt 2": "$A",
    "both": f"{BEGIN} $A {END}",
    "end only": f"$A {END}",
    "two": f"{BEGIN} {BEGIN} $A",
}
#: A conversation in lines, which strips what is said, as Llama 3's does.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(frame: str = "llama 3", **more: Any) -> Any:
    """Bytes, and one merge: of a colon and a y."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([BEGIN, END, *alphabet, ":y"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "y")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END)])
    made.post_processor = processors.TemplateProcessing(
        single=FRAMES[frame], special_tokens=[(BEGIN, 0), (END, 1)]
    )
    options = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, **more}
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)
