"""What identifies a model: files of its folder, revisions, weights, tokenizer."""

from __future__ import annotations

from pathlib import Path

from lvlm.identity import deciding_files


def test_every_file_that_decides_on_prompts_tokens_pixels_or_code_is_listed(tmp_path: Path) -> None:
    """Templates, merges, sentencepiece models and code are part of a model, documents and pictures are not."""
    decide = [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "modeling_own.py",
        "preprocessor_config.json",
        "sub/inner/more.py",
        "tokenizer.model",
        "vocab.txt",
    ]
    for name in [*decide, "README.md", "sample.png", ".gitattributes", "sub/notes.txt", "__pycache__/own.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "merges.txt")
    names = [path.relative_to(tmp_path).as_posix() for path in deciding_files(tmp_path)]
    assert names == sorted([*decide, "linked.txt"])
    assert "model.safetensors" not in [path.name for path in deciding_files(tmp_path, weights=False)]
    assert deciding_files(tmp_path / "absent") == ()
