"""What a model on disk is: the files of its folder that decide on what it does, and the revision of a Hugging Face id."""

from __future__ import annotations

from pathlib import Path

_DOCUMENTS = frozenset(
    {".md", ".rst", ".pdf", ".html", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".log", ".lock"}
)
"""Suffixes of files that no loader reads."""
_BELOW = frozenset({".py", ".jinja"})
"""Suffixes of files that loaders also read in folders below: modules of the model's own code, further chat templates."""
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"})
"""Suffixes of files that hold weights."""
_DEPTH = 4


def deciding_files(folder: str | Path, *, weights: bool = True) -> tuple[Path, ...]:
    """Return the regular files of a model folder that decide on its prompts, tokens, pixels, code or weights.

    Those are all files of the folder but documents, pictures and hidden files (configuration, ``chat_template.jinja``,
    ``merges.txt``, ``tokenizer.model``, processor settings, ...), and the Python modules and Jinja templates of the folders
    below it. A link to a file counts as the file.

    Parameters
    ----------
    folder
        A folder in Hugging Face layout.
    weights
        Whether to list files of weights too.

    Returns
    -------
    tuple of Path
        Sorted by path; empty where the folder does not exist.

    Examples
    --------
    >>> from lvlm.model_files import deciding_files
    >>> from lvlm.embedded_models import folder_of
    >>> [path.name for path in deciding_files(folder_of("tiny"), weights=False)][:2]
    ['config.json', 'generation_config.json']
    """
    root = Path(folder)
    if not root.is_dir():
        return ()
    files = [*root.iterdir(), *_below(root, _DEPTH)]
    return tuple(sorted(path for path in files if _decides(path, weights=weights)))


def _below(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    for child in folder.iterdir():
        if depth and child.is_dir() and not child.is_symlink() and not child.name.startswith((".", "__pycache__")):
            found += [path for path in child.iterdir() if path.suffix in _BELOW]
            found += _below(child, depth - 1)
    return found


def _decides(path: Path, *, weights: bool) -> bool:
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix in _DOCUMENTS or not path.is_file():
        return False
    return weights or suffix not in WEIGHTS


def resolved_revision(source: str | Path, revision: str | None = None) -> str | None:
    """Return the commit that a Hugging Face id stands for now: as the Hub says, or the local cache where it is offline.

    Parameters
    ----------
    source
        A Hugging Face id.
    revision
        A branch, tag or commit of it; by default its main branch.

    Returns
    -------
    str or None
        40 hexadecimal digits; None for a folder, and where neither the Hub nor the cache has a configuration of that id.
    """
    from lvlm.embedded_models import EMBEDDED

    if str(source) in EMBEDDED or Path(source).is_dir():
        return None
    from transformers.utils.hub import extract_commit_hash

    path = hub_file(str(source), "config.json", {"revision": revision})
    return None if path is None else extract_commit_hash(str(path), None)


def hub_file(source: str, name: str, options: dict[str, object]) -> Path | None:
    """Return a file of a model by name, from its folder, the cache or the Hub; None where there is no such file.

    Parameters
    ----------
    source
        A folder, or a Hugging Face id.
    name
        Path of the file relative to the folder.
    options
        ``revision`` and ``local_files_only``, as ``from_pretrained`` takes them.
    """
    from transformers.utils.hub import cached_file

    known = {k: v for k, v in options.items() if k in {"revision", "local_files_only", "cache_dir"} and v is not None}
    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **known,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
