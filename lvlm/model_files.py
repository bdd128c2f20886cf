"""Files of a model's folder that determine its behavior, and the commit of a Hugging Face id."""

from __future__ import annotations

from pathlib import Path

_DOCUMENTS = frozenset(
    {".md", ".rst", ".pdf", ".html", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".log", ".lock"}
)
"""Suffixes of files that loaders never read."""
_BELOW = frozenset({".py", ".jinja"})
"""Suffixes of files that loaders also read in subfolders: modules of the model's own code, additional chat templates."""
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"})
"""Suffixes of files with weights."""
_DEPTH = 4


def deciding_files(folder: str | Path, *, weights: bool = True) -> tuple[Path, ...]:
    """Return the regular files of a model folder that determine its prompts, tokens, pixels, code or weights.

    These are all files of the folder except documents, pictures and hidden files (configuration, ``chat_template.jinja``,
    ``merges.txt``, ``tokenizer.model``, processor settings, ...), and the Python modules and Jinja templates in its
    subfolders. A link to a file counts as the file.

    Parameters
    ----------
    folder
        A folder in Hugging Face layout.
    weights
        Whether to include files of weights.

    Returns
    -------
    tuple of Path
        Sorted by path; empty if the folder does not exist.

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
    files = [*root.iterdir(), *_files_below(root, _DEPTH)]
    return tuple(sorted(path for path in files if _determines_behavior(path, weights=weights)))


def _files_below(folder: Path, depth: int) -> list[Path]:
    files: list[Path] = []
    for child in folder.iterdir():
        if depth and child.is_dir() and not child.is_symlink() and not child.name.startswith((".", "__pycache__")):
            files += [path for path in child.iterdir() if path.suffix in _BELOW]
            files += _files_below(child, depth - 1)
    return files


def _determines_behavior(path: Path, *, weights: bool) -> bool:
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix in _DOCUMENTS or not path.is_file():
        return False
    return weights or suffix not in WEIGHTS


def resolved_revision(
    source: str | Path, revision: str | None = None, cache_dir: str | Path | None = None
) -> str | None:
    """Return the current commit of a Hugging Face id, from the Hub, or offline from the local cache.

    Parameters
    ----------
    source
        A Hugging Face id.
    revision
        A branch, tag or commit of it; by default its main branch.
    cache_dir
        Folder of downloaded files; by default that of Hugging Face.

    Returns
    -------
    str or None
        40 hexadecimal digits; None for a folder, and if neither the Hub nor the cache has a configuration of the id.
    """
    from lvlm.embedded_models import EMBEDDED

    if str(source) in EMBEDDED or Path(source).is_dir():
        return None
    from transformers.utils.hub import extract_commit_hash

    path = hub_file(str(source), "config.json", {"revision": revision, "cache_dir": cache_dir})
    return None if path is None else extract_commit_hash(str(path), None)


def hub_file(source: str, name: str, options: dict[str, object]) -> Path | None:
    """Return a file of a model by name, from its folder, the cache or the Hub; None if it does not exist.

    Parameters
    ----------
    source
        A folder, or a Hugging Face id.
    name
        Path of the file relative to the folder.
    options
        ``revision`` and ``local_files_only``, as in ``from_pretrained``.
    """
    from transformers.utils.hub import cached_file

    accepted = {"revision", "local_files_only", "cache_dir"}
    cache_options = {k: v for k, v in options.items() if k in accepted and v is not None}
    try:
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **cache_options,
        )
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)
