"""Checkpoint files: which file or name is meant, what it holds, and what it says about itself.

Importing this module imports no torch: `identity` is asked for on machines and at moments that need none.

Two kinds of file are told apart by their content, never by their suffix. Data (safetensors, and what torch.save makes
of tensors and plain values) is read as it is. Programs are not: a pickled module, a torch.export program and a
TorchScript archive can all touch files of their reader's while they are being loaded, so each needs `trust`.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cdclean import __version__, storage
from cdclean.config import INTERPOLATIONS, ModelSpec, Resize
from cdclean.errors import ModelError
from cdclean.storage import to_text as shown

if TYPE_CHECKING:
    import torch

Source = Literal["file", "timm", "hf-hub", "local-dir"]
Form = Literal["safetensors", "torch.save", "legacy torch.save", "TorchScript", "torch.export"]

_STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights
_WEIGHT_SUFFIXES = {".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors", ".tar", ".pkl"}
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # torch.save before 1.6: a number near the start of a pickle
_WEIGHTS_ALONE = "save the weights alone, torch.save(model.state_dict(), 'model.pt'), and give --arch"


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about its network. Everything may be missing; `training` fills in all of it."""

    arch: str | None = None  # timm:NAME
    class_names: tuple[str, ...] | None = None  # in the order of the network's outputs
    input_size: tuple[int, int] | None = None  # height, width in pixels
    in_chans: int | None = None
    mean: tuple[float, ...] | None = None  # per channel, of pixels in [0, 1]
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None  # as in config.Geometry, and the next two
    crop_mode: Resize | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: weights by name, or a whole network."""

    content: dict[str, torch.Tensor] | torch.nn.Module
    metadata: Metadata
    form: Form


def split_source(source: str) -> tuple[Source, str]:
    """What `--model` means: ("timm", "resnet50") for timm:resnet50, ("file", path) where no known prefix stands."""
    prefix, separator, name = source.partition(":")
    for kind in get_args(Source):
        if separator and kind != "file" and prefix.lower().replace("_", "-") == kind:
            return kind, name
    return "file", source


def identity(spec: ModelSpec) -> str:
    """SHA-256 (hexadecimal) of the weights: of the file, or of config and weights in a local-dir.

    For a model that timm downloads, its name. Raises ModelError where there is no such file or folder.
    """
    kind, name = split_source(spec.source)
    if kind == "file":
        return _sha256(find(name))
    if kind == "local-dir":
        suffixes = {".json", ".safetensors", ".bin", ".pth", ".tar"}  # what timm reads
        files = sorted(path for path in Path(name).glob("*") if path.suffix in suffixes and path.is_file())
        if not files:
            raise ModelError(f"{name} is no folder with a config.json and weights, as timm saves them")
        return hashlib.sha256("".join(f"{path.name}\0{_sha256(path)}\0" for path in files).encode()).hexdigest()
    return spec.source


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def find(name: str) -> Path:
    """The checkpoint file `name`. Raises ModelError, with what was probably meant, where there is no such file."""
    path = storage.local_path(name)
    try:
        if path.is_file():
            return path
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise _unreadable(path, error) from error
    if path.is_dir():
        saved_by_timm = (path / "config.json").is_file()
        meant = f"local-dir:{shown(path)}" if saved_by_timm else "the checkpoint file in it"
        raise ModelError(f"{shown(path)} is a folder, not a checkpoint", hint=f"Give {meant}.")
    if path.name != name or path.suffix in _WEIGHT_SUFFIXES:
        raise ModelError(f"there is no checkpoint {shown(path)}", hint="Check the path given as --model.")
    raise unknown(name, f"there is no file {name!r} in the current folder")


def unknown(name: str, problem: str) -> ModelError:
    """The error for a name that is no file or no timm network, which suggests names near it."""
    import timm

    if timm.is_model(name):
        return ModelError(problem, hint=f"For the published weights of that name: --model timm:{name}")
    architecture = name.partition(".")[0]
    near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    listed = "All names: python -c 'import timm; print(timm.list_models())'"
    hint = f"timm has {', '.join(f'timm:{match}' for match in near)}. {listed}" if near else listed
    return ModelError(problem, hint=hint)


def read(path: Path, *, trust: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Without `trust` no code from the file runs: it must hold tensors and plain values. With it, whole networks are
    accepted too. Raises ModelError for anything that is no checkpoint, is damaged, or needs `trust`.
    """
    form = _form(path)
    if form in ("TorchScript", "torch.export") and not trust:
        raise ModelError(
            f"{shown(path)} is a {form} program, and loading a program can read and write any of your files; "
            "nothing was loaded",
            hint=f"If you trust its origin, add --trust-checkpoint. Or {_WEIGHTS_ALONE}.",
        )
    if form == "safetensors":
        return _read_safetensors(path)
    if form == "TorchScript":
        return Checkpoint(_read_torchscript(path), Metadata(), form)
    if form == "torch.export":
        return Checkpoint(_read_exported(path), Metadata(), form)
    content, metadata = _unwrap(_unpickle(path, trust), path)
    return Checkpoint(content, metadata, form)


def save_checkpoint(path: Path, state_dict: Mapping[str, torch.Tensor], metadata: Metadata) -> None:
    """Write weights and what is known of them to `path`, whole or not at all, so that `read` needs nothing else.

    Safetensors where the name ends in .safetensors, else torch.save's format with plain values. Raises OutputError.
    """
    import torch
    from safetensors.torch import save

    known = {name: value for name, value in asdict(metadata).items() if value is not None}
    known = json.loads(json.dumps(known | {"cdclean_version": __version__}))  # tuples become lists: plain types
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    if path.suffix == ".safetensors":
        encoded = save(tensors, metadata={"cdclean": json.dumps(known)})
    else:
        buffer = io.BytesIO()  # torch's own writer can abort the process on a full disk
        torch.save({"state_dict": tensors, "cdclean": known}, buffer)
        encoded = buffer.getvalue()
    with storage.atomic_write(path) as file:
        file.write(encoded)


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let `import` find modules of the current folder, as `python` does and an installed command does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _form(path: Path) -> Form:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise _unreadable(path, error) from error
    if head.startswith(b"PK\x03\x04"):
        return _archive_form(path)
    if head[:1] == b"\x80" and _LEGACY_MAGIC in head:
        return "legacy torch.save"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    raise _no_checkpoint(path, "it is empty" if not head else "its first bytes are those of something else")


def _archive_form(path: Path) -> Form:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{shown(path)} is damaged or was cut short ({error})", hint="Copy or download the checkpoint again."
        ) from error
    members = {name.partition("/")[2] or name for name in names}  # all lie in one folder, named after the file
    if "constants.pkl" in members:
        return "TorchScript"
    if members & {"models/model.json", "archive_format", "serialized_exported_program.json"} or (
        "serialized_exported_program.json" in names
    ):
        return "torch.export"
    if "data.pkl" in members:
        return "torch.save"
    raise _no_checkpoint(path, "it is a ZIP archive of something else")


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot read {shown(path)}: {error.strerror or error}")


def _no_checkpoint(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{shown(path)} is not a checkpoint: {reason}",
        hint="--model takes what torch.save or safetensors wrote, TorchScript, a torch.export program, or timm:NAME.",
    )


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        state = load(content)
    except (SafetensorError, OSError, ValueError) as error:
        raise _no_checkpoint(path, f"safetensors says: {error}") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    try:
        own = json.loads(header.get("cdclean", "null"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{shown(path)} describes itself in JSON that cannot be parsed: {error}") from error
    return Checkpoint(state, _metadata({**header, "cdclean": own}, path), "safetensors")


def _read_torchscript(path: Path) -> torch.nn.Module:
    import torch

    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`torch\.jit", category=Warning)  # deprecated, yet in use
            module: torch.nn.Module = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{shown(path)} holds TorchScript that torch cannot load: {first_line(error)}") from error
    return module


def _read_exported(path: Path) -> torch.nn.Module:
    import torch

    try:
        with path.open("rb") as file:
            return torch.export.load(file).module()
    except Exception as error:  # the file's own code runs here, and it may raise what it likes
        raise ModelError(
            f"torch {torch.__version__} cannot load the torch.export program in {shown(path)}: {first_line(error)}",
            hint="Export it again with this version of torch.",
        ) from error


def _unpickle(path: Path, trust: bool) -> Any:
    import torch

    try:
        # An open file, because torch.load would judge a path by its suffix. A Namespace is a bare holder of values,
        # in which timm's training script saves its arguments.
        with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f"a pickled {named[1]}" if named else "pickled objects"
            raise ModelError(
                f"{shown(path)} holds {what}, not weights alone. It was not loaded: "
                "unpickling runs whatever code a file carries",
                hint=f"If you trust its origin, add --trust-checkpoint. Or {_WEIGHTS_ALONE}.",
            ) from error
    except Exception as error:  # a file made of nonsense makes the unpickler raise anything
        raise ModelError(
            f"{shown(path)} is damaged or was cut short ({first_line(error)})",
            hint="Copy or download the checkpoint again.",
        ) from error
    try:
        with path.open("rb") as file, current_folder_importable():
            return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # the file's own code runs here, and it may raise what it likes
        raise ModelError(
            f"{shown(path)} cannot be unpickled: {type(error).__name__}: {first_line(error)}",
            hint=f"The code that defines its classes must be importable from the current folder. Or {_WEIGHTS_ALONE}.",
        ) from error


def _unwrap(value: Any, path: Path) -> tuple[dict[str, torch.Tensor] | torch.nn.Module, Metadata]:
    """Find the weights (or the network) in what torch.save was given."""
    from torch import nn

    if isinstance(value, nn.Module) or _is_state(value):
        return _plain(value), Metadata()
    if isinstance(value, Mapping):
        for key in _STATE_KEYS:
            if isinstance(value.get(key), nn.Module) or _is_state(value.get(key)):
                return _plain(value[key]), _metadata(value, path)
        listed = ", ".join(repr(key)[:40] for key in list(value)[:8]) or "nothing"
        found = f"a dict of {listed}"
    else:
        found = f"a {type(value).__name__}"
    raise ModelError(
        f"{shown(path)} holds {found}: no weights, neither at the top nor under {', '.join(_STATE_KEYS)}",
        hint=f"Please {_WEIGHTS_ALONE}.",
    )


def _is_state(value: Any) -> bool:
    import torch

    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def _plain(value: Any) -> dict[str, torch.Tensor] | torch.nn.Module:
    return dict(value) if isinstance(value, Mapping) else value


def _metadata(holder: Mapping[str, Any], path: Path) -> Metadata:
    """What stands beside the weights: our own description, or what timm's training script and others leave there."""
    own = holder.get("cdclean")
    if own is None:
        arguments = holder.get("args")
        own = _usable(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
        named = holder.get("arch") or holder.get("architecture")
        own["arch"] = named if isinstance(named, str) else None
    try:
        return parse_metadata(own)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ModelError(f"{shown(path)} describes itself in a way that cannot be used: {error}") from error


def _usable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a training script was called with, as far as it says what images the network was shown.

    Scripts use these names for other things, too: what makes no sense here is not said.
    """
    found: dict[str, Any] = {}
    for name in ("img_size", "input_size", "in_chans", "mean", "std", "crop_pct", "crop_mode", "interpolation"):
        value: Any = arguments.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        with suppress(TypeError, ValueError, OverflowError):
            if name in ("img_size", "input_size"):
                name, value = "input_size", _sides(value)
            parse_metadata({name: value})
            found |= {name: value} if value else {}
    return found


def _sides(size: Any) -> Sequence[int] | None:
    """Height and width, of one number or of timm's channels, height, width."""
    if isinstance(size, Sequence) and not isinstance(size, str):
        return size[-2:]
    return None if not size or isinstance(size, bool) else (int(size),) * 2


def parse_metadata(values: Mapping[str, Any]) -> Metadata:
    """Metadata from plain values, each checked; unknown names are ignored.

    Raises TypeError, ValueError or OverflowError.
    """
    held = {name: value for name, value in values.items() if value is not None and value != ""}
    for name in ("arch", "interpolation"):
        if not isinstance(held.get(name, ""), str):
            raise TypeError(f"{name} must be text, not {held[name]!r}")
    size = tuple(int(side) for side in held["input_size"]) if "input_size" in held else None
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"input_size must be a height and a width, not {held['input_size']!r}")
    if held.get("interpolation", "bicubic") not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, not {held['interpolation']!r}")
    if held.get("crop_mode", "center") not in get_args(Resize):
        raise ValueError(f"crop_mode must be one of {', '.join(get_args(Resize))}, not {held['crop_mode']!r}")
    return Metadata(
        arch=held.get("arch"),
        class_names=tuple(str(name) for name in held["class_names"]) if "class_names" in held else None,
        input_size=None if size is None else (size[0], size[1]),
        in_chans=int(held["in_chans"]) if "in_chans" in held else None,
        mean=tuple(float(value) for value in held["mean"]) if "mean" in held else None,
        std=tuple(float(value) for value in held["std"]) if "std" in held else None,
        crop_pct=float(held["crop_pct"]) if "crop_pct" in held else None,
        crop_mode=held.get("crop_mode"),
        interpolation=held.get("interpolation"),
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
