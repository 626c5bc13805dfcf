"""A compact network as a file that a service can load: ONNX, PyTorch's exported program, or its weights alone.

The first two hold any network and need none of its code. Weights (safetensors, or any state dict) need the class they
came from: :func:`rebuild` gives a freshly built, dense network the stored widths.
"""

import copy
import inspect
import io
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apbm_core.errors import CheckpointError, ConfigError, UnsupportedNetwork
from apbm_core.files import write_atomically
from apbm_core.fusion import fused_layers

FORMATS = {".onnx": "ONNX Runtime", ".pt2": "torch.export", ".safetensors": "safetensors"}

Call = Callable[..., Any]


def why_no_onnx() -> str:
    """A sentence that says what is missing for ONNX, which is an optional extra; empty if nothing is."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        return f"ONNX is left out ({error}); install it with: pip install 'apbm-core[onnx]'."
    return ""


def write_onnx(path: str | Path, model: nn.Module, example_inputs: Any, any_size: bool = False) -> Path:
    """Write ``model``, in evaluation mode, as an ONNX file for batches of any size.

    A network with one input calls it ``images``; several have the names of ``forward``'s parameters.

    Args:
        path: the file, replaced atomically.
        model: any network without fused layers; left as it was.
        example_inputs: one batch the network accepts: a tensor of shape (N, ...), a tuple of arguments, or a dict of
            keyword arguments.
        any_size: leave the images' height and width open, too (every dimension but the first two), for networks that
            take all.

    Raises:
        ConfigError: the network is fused still, or the ONNX packages are not installed.
        UnsupportedNetwork: the network cannot be exported, or not for every size; the message says why.
        ApbmError: the file cannot be written.
    """
    return write_atomically(path, onnx_bytes(model, example_inputs, any_size))


def write_exported(path: str | Path, model: nn.Module, example_inputs: Any, any_size: bool = False) -> Path:
    """Write ``model``, in evaluation mode, as an exported PyTorch program (``.pt2``) for batches of any size.

    Arguments and errors as :func:`write_onnx`, which needs more packages.
    """
    buffer = io.BytesIO()
    torch.export.save(_exported(model, example_inputs, any_size, "torch.export"), buffer)
    return write_atomically(path, buffer.getvalue())


def write_safetensors(path: str | Path, model: nn.Module) -> Path:
    """Write the weights and buffers of a compact network; :func:`rebuild` reads them into a network again.

    Raises:
        ConfigError: the network is fused still, or safetensors is not installed.
        ApbmError: the file cannot be written.
    """
    _refuse_fused(model)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    return write_atomically(path, _safetensors().save(tensors, {"format": "pt"}))


def rebuild(model: nn.Module, weights: Mapping[str, Tensor] | str | Path) -> nn.Module:
    """A copy of ``model`` with the weights of a compact network, whose widths its layers take over.

    Args:
        model: the dense network the compact one was made from, freshly built; not modified.
        weights: a state dict, or the path of a file that :func:`write_safetensors` wrote.

    Raises:
        CheckpointError: the file is missing or damaged, or the weights are not those of such a network.
    """
    if not isinstance(weights, Mapping):
        try:
            weights = _safetensors().load(Path(weights).read_bytes())
        except ConfigError:
            raise
        except Exception as error:
            raise CheckpointError(f"{weights} cannot be loaded ({error}); restore it or write it again.") from error
    small = copy.deepcopy(model)
    for name, module in small.named_modules():
        prefix = f"{name}." if name else ""
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                saved = weights.get(prefix + key)
                if tensor is None or saved is None or saved.shape == tensor.shape or saved.dim() != tensor.dim():
                    continue
                resized = tensor.detach().new_empty(saved.shape)
                if isinstance(tensor, nn.Parameter):
                    resized = nn.Parameter(resized, requires_grad=tensor.requires_grad)
                kind[key] = resized
        count_channels(module)
    try:
        small.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights are not those of a compact {type(model).__name__}: {error}") from error
    return small


def open_file(path: str | Path, threads: int = 1) -> Call:
    """The network in an ``.onnx`` or ``.pt2`` file, as a function from its inputs to what it returns, on the CPU.

    Open exported programs only from those you trust.

    Args:
        threads: how many ONNX Runtime may use; PyTorch's number is its own, set for the whole process.

    Raises:
        ConfigError: another ending, or the ONNX packages are not installed.
        CheckpointError: the file is missing or damaged.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"{path} has none of the endings .onnx, .pt2, so its format is not known.")
    if path.suffix == ".onnx" and (reason := why_no_onnx()):
        raise ConfigError(reason)
    try:
        content = path.read_bytes()
        if path.suffix == ".onnx":
            return onnx_call(content, threads)
        return torch.export.load(io.BytesIO(content)).module()
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded ({error}); restore it or write it again.") from error


def onnx_bytes(model: nn.Module, example_inputs: Any, any_size: bool = False) -> bytes:
    """What :func:`write_onnx` writes."""
    if reason := why_no_onnx():
        raise ConfigError(reason)
    program = _exported(model, example_inputs, any_size, "ONNX")
    names = ["images"] if isinstance(example_inputs, Tensor) else None
    with _explained(type(model).__name__, "ONNX"):
        return torch.onnx.export(program, dynamo=True, verbose=False, input_names=names).model_proto.SerializeToString()


def onnx_call(content: bytes, threads: int = 1) -> Call:
    """An ONNX network as a function of tensors, computed by ONNX Runtime on so many threads of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def call(*tensors: Tensor) -> Any:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        outputs = [torch.from_numpy(output) for output in session.run(None, feed)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def count_channels(module: nn.Module) -> None:
    """Set a layer's numbers of channels to those that its parameters have."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise: each channel is a group
            per_group = module.out_channels // module.groups
            module.groups = first if module.transposed else first // per_group
        channels = (first, second * module.groups) if module.transposed else (second * module.groups, first)
        module.in_channels, module.out_channels = channels
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        module.num_features = len(weight)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]


def _exported(model: nn.Module, example_inputs: Any, any_size: bool, format_name: str) -> torch.export.ExportedProgram:
    """The forward pass of a copy on the CPU in evaluation mode, for any number of images."""
    _refuse_fused(model)
    if isinstance(example_inputs, Mapping):
        parameters = inspect.signature(model.forward).parameters
        example_inputs = {name: example_inputs[name] for name in parameters if name in example_inputs} | example_inputs
    batch = pytree.tree_map_only(Tensor, _at_least_two, example_inputs)
    open_dims = pytree.tree_map(lambda leaf: _open_dimensions(leaf, any_size), batch)
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
    shapes = open_dims if isinstance(open_dims, (tuple, dict)) and not isinstance(batch, Tensor) else (open_dims,)
    with _explained(type(model).__name__, format_name):
        return torch.export.export(copy.deepcopy(model).cpu().eval(), args, dict(kwargs), dynamic_shapes=shapes)


def _at_least_two(tensor: Tensor) -> Tensor:
    """On the CPU, and at least two in the first dimension: a batch of one would be taken for a constant."""
    tensor = tensor.detach().cpu()
    return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == 1 else tensor


def _open_dimensions(leaf: Any, any_size: bool) -> dict[int, Any] | None:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return None
    sizes = dict.fromkeys(range(2, leaf.dim()), torch.export.Dim.DYNAMIC) if any_size else {}
    return {0: torch.export.Dim("batch", min=1)} | sizes


def _refuse_fused(model: nn.Module) -> None:
    if any(True for _ in fused_layers(model)):
        raise ConfigError("the network is fused still: its banks are for training; write apbm_core.compact(network).")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            f"safetensors is not installed ({error}); install it with: pip install 'apbm-core[onnx]'."
        ) from None
    return safetensors.torch


@contextmanager
def _explained(network: str, format_name: str):
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedNetwork(
            f"this {network} cannot be exported as {format_name}: {reason} A forward() that depends on "
            "the images' values, or on their number, cannot."
        ) from error
