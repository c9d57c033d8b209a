"""All-gather of low-bit weights: what travels between processes are codes at their true width, and a step a row.

    rank r's rows of W --quantize--> codes, step --pack--> words --all-gather--> every row's codes --> y = x . W^T
    dL/dW's values (O, I) --reduce-scatter--> mean over ranks of rank r's rows --the quantizer's backward--> gradients

A method that quantizes a weight by rows needs nothing of other rows, so each process quantizes its own and sends, for
2 bits, an eighth of what bfloat16 takes. Weights and per-row parameters are DTensors cut by rows, as those of FSDP2
are, which has to be told to leave them alone (`LowBitGather.parameters`): state dicts, clipping and optimizers see no
difference. Forward passes are equal to the whole layer's to the last bit, gradients up to the order of the reduction.

Layers of one block travel in one message. The next block's is on its way while a block computes; in the backward pass
the one before. Autograd runs what was recorded last first, and a block's rows are quantized before the previous block
computes, so the wait for a reduced gradient comes after that block's backward pass, without a hook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from bitbell.kernels import pack_codes, packed_words, product_dtype, unpack_codes
from bitbell.layers import QuantLinear, TrainedLayer, quantized_layers
from bitbell.layers.product import grid_of, values_of
from bitbell.quantizers import Quantized, make_quantizer
from bitbell.quantizers.ranks import Ranks


class LowBitGather:
    """Holds each quantized weight of `model` by rows, and gathers its codes where a layer needs them.

    Call it on a model whose weights are equal on all processes, and calibrated if no checkpoint is to follow, before
    `fully_shard(..., ignored_params=gather.parameters)`; make the optimizer afterwards. mesh: one dimension. blocks:
    modules whose layers travel together and in this order; a layer outside of them travels alone. regather: free codes
    after the forward pass and gather them again in the backward pass (a byte a weight less of memory, twice the
    messages). prefetch: send the next block's early.

    parameters: what FSDP must ignore. kept: layers that are left to it, with the reason. Raises ValueError for a mesh
    of more dimensions, and for a model without any layer that can be gathered so.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        blocks: Sequence[nn.Module] = (),
        *,
        regather: bool = True,
        prefetch: bool = True,
    ) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension for a low-bit gather, got {mesh.ndim}: {mesh}")
        self.mesh, self.regather, self.prefetch = mesh, regather, prefetch
        self.reduced = 0  # gradients so far; what was gathered before the last of them may be of older weights
        self.kept: dict[str, str] = {}
        layers: list[TrainedLayer] = []
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        for name, layer in quantized_layers(model):
            if (reason := _why_not(layer, owners[id(layer.weight)], mesh.size())) is None:
                layers.append(layer)
            else:
                self.kept[name] = reason
        if not layers:
            reasons = "; ".join(sorted(set(self.kept.values()))) or "none is quantized"
            raise ValueError(f"no layer's weight can be gathered in low bits: {reasons}")
        self.parameters: set[nn.Parameter] = set()
        self.groups = [_Group(self, [_Rows(layer, self) for layer in group]) for group in _grouped(layers, blocks)]
        for group, after in zip(self.groups, self.groups[1:], strict=False):
            group.next = after

    def kept_by_reason(self) -> dict[str, list[str]]:
        """Reasons with the names of the layers that are left to FSDP for them."""
        reasons = dict.fromkeys(self.kept.values())
        return {reason: [name for name, why in self.kept.items() if why == reason] for reason in reasons}


def _why_not(layer: Any, owners: int, ranks: int) -> str | None:
    """Why the weight of `layer`, which that many modules own, cannot be gathered in codes; None if it can."""
    if not isinstance(layer, QuantLinear) and not _is_transposed(layer):
        return f"a {type(layer).__name__} is no linear layer in training"
    quantizer = layer.weight_quantizer
    if quantizer.rows is None:
        return f"{quantizer.method} has one scale or statistic for all rows of a weight"
    if layer.out_features < ranks:
        return f"{layer.out_features} rows are fewer than {ranks} processes"
    return None if owners == 1 else "its weight is also another module's"


def _is_transposed(layer: nn.Module) -> bool:
    """Whether `layer` is GPT-2's kind, which stores its weight as (inputs, outputs)."""
    return type(layer).__name__ == "QuantConv1D"


def _grouped(layers: Sequence[TrainedLayer], blocks: Sequence[nn.Module]) -> Iterator[list[TrainedLayer]]:
    block_of = {module: block for block in blocks for module in block.modules()}
    groups: dict[nn.Module, list[TrainedLayer]] = {}
    for layer in layers:
        groups.setdefault(block_of.get(layer, layer), []).append(layer)
    yield from groups.values()


class _Rows:
    """This rank's rows of one layer's weight, and a quantizer for them."""

    group: _Group

    def __init__(self, layer: TrainedLayer, gather: LowBitGather) -> None:
        self.layer, self.gather = layer, gather
        self.rows, self.columns, self.bits = layer.out_features, layer.in_features, layer.weight_quantizer.bits
        self.ranks = gather.mesh.size()
        self.rows_each = -(-self.rows // self.ranks)  # the last ranks may have fewer, or none
        self.words = packed_words(self.columns, self.bits)
        self.dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self._cut(layer, "weight", 1 if _is_transposed(layer) else 0)
        quantizer = layer.weight_quantizer
        for name in list(quantizer._parameters):
            if quantizer._parameters[name] is not None:
                self._cut(quantizer, name, 0)
        self.twin = self._twin() if self.here else None
        layer.row_gather = self

    def _cut(self, module: nn.Module, name: str, dim: int) -> None:
        """Replace a parameter by this rank's part of it, a DTensor that still knows the whole shape."""
        whole: Any = module._parameters[name]
        start = min(self.gather.mesh.get_local_rank() * self.rows_each, self.rows)
        self.here = min(self.rows_each, self.rows - start)
        part = whole.detach().narrow(dim, start, self.here).clone()
        cut = DTensor.from_local(
            part, self.gather.mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        parameter = nn.Parameter(cut, requires_grad=whole.requires_grad)
        setattr(module, name, parameter)
        self.gather.parameters.add(parameter)

    def _twin(self) -> Any:
        """A quantizer like the layer's for `here` rows; its parameters are put in at each use."""
        quantizer = self.layer.weight_quantizer
        twin = make_quantizer(quantizer.method, **(quantizer.options() | {"rows": self.here}))
        twin.calibrated = quantizer.calibrated
        twin.ranks = Ranks(self.rows / self.here)  # gradients of scales are divided by the whole weight's elements
        return twin.to(quantizer.calibrated.device)

    def state(self) -> tuple[object, ...]:
        """What the codes depend on beside the weights' numbers, and whether those may have changed."""
        parameters: list[Any] = [self.layer.weight, *self.layer.weight_quantizer.parameters()]
        with torch.no_grad():  # where to_local() is the tensor itself, with its own version
            tensors = [*parameters, *(p.to_local() for p in parameters)]
        # PyTorch's fused optimizers change a DTensor without counting; gradients are reduced before each step.
        versions = self.gather.reduced, *(0 if t.is_inference() else t._version for t in tensors)
        return torch.is_grad_enabled(), product_dtype(tensors[-1]), self.layer.training, *versions

    def quantize(self) -> tuple[Tensor, Quantized | None]:
        """Values of this rank's rows, for their gradient, and their codes and step; None for no rows."""
        weight: Any = self.layer.weight
        rows = weight.to_local().T.contiguous() if _is_transposed(self.layer) else weight.to_local()
        named: Any = self.layer.weight_quantizer.named_parameters(recurse=False)
        parts = {name: parameter.to_local() for name, parameter in named}
        if self.twin is None:  # gradients of no elements, but of all parameters: who clips waits for every rank
            return rows + torch.stack([rows.sum(), *(part.sum() for part in parts.values())]).sum(), None
        self.twin._parameters.update(parts)
        twin = self.twin.train(self.layer.training)
        q = twin.quantize_codes(rows) if self.layer.integer_forward else twin.quantize(rows)
        return q.values, q

    def record(self, q: Quantized | None) -> Tensor:
        """What is sent of this rank's rows: (rows_each, ...) int32: words of codes, bits of the step, of the offset."""
        device = self.layer.weight.device
        if q is None:
            return torch.zeros(self.rows_each, self.record_words, dtype=torch.int32, device=device)
        codes = q.codes.view(torch.uint8) + 2 ** (self.bits - 1)  # wraps around for 8 bits, as it should
        floats = [q.step] if q.offset is None else [q.step, q.offset]
        bits = [t.detach().to(self.dtype).expand(self.here, 1).contiguous().view(torch.int32) for t in floats]
        return pad(torch.cat([pack_codes(codes, self.bits), *bits], dim=1), (0, 0, 0, self.rows_each - self.here))

    @property
    def record_words(self) -> int:
        floats = 1 + (self.layer.weight_quantizer.offset is not None)
        return self.words + floats * self.dtype.itemsize // 4

    def read(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (O, I) int8, step (O, 1) and offset from all ranks' records."""
        records = records.reshape(-1, self.record_words)[: self.rows]
        codes = unpack_codes(records[:, : self.words].contiguous(), self.bits, self.columns)
        floats = records[:, self.words :].contiguous().view(self.dtype)
        offset = floats[:, 1:] if floats.shape[1] > 1 else None
        return codes.sub_(2 ** (self.bits - 1)).view(torch.int8), floats[:, :1].contiguous(), offset

    @torch.compiler.disable
    def forward(self, layer: TrainedLayer, x: Tensor) -> Tensor:
        """The layer's output, with its weight's codes gathered, unless someone has put in the whole weight meanwhile.

        Not compiled: collectives and hooks break graphs."""
        if not isinstance(layer.weight, DTensor):
            return layer.multiply(x, layer.quantize_weight())
        gathered = self.group.gathered(self)
        w = gathered.weight(self)
        with gathered.regathering(self, w.codes):
            return layer.multiply(x, w)


class _Group:
    """Layers whose rows travel in one message."""

    def __init__(self, gather: LowBitGather, members: list[_Rows]) -> None:
        self.gather, self.members = gather, members
        self.next: _Group | None = None
        self.current: _Gathered | None = None
        for rows in members:
            rows.group = self

    def gathered(self, rows: _Rows) -> _Gathered:
        """The message that holds the codes of `rows`: the one on its way, unless it is another pass's."""
        if self.current is None or rows in self.current.served or self.current.state != self.state():
            self.current = _Gathered(self)
        current = self.current
        if not current.served:
            self._send_next(current)
        current.served.add(rows)
        if len(current.served) == len(self.members):
            self.current = None
        return current

    def _send_next(self, current: _Gathered) -> None:
        following = self.next
        # A block that is computed once more within the backward pass goes backwards.
        if following is None or not self.gather.prefetch or torch._C._current_graph_task_id() != -1:
            return
        if following.current is None or following.current.state != following.state():
            following.current = _Gathered(following)
        following.current.before = current

    def state(self) -> list[tuple[object, ...]]:
        return [rows.state() for rows in self.members]


class _Gathered:
    """One forward pass's codes of a group: on their way, here, or gone and to be sent again in the backward pass."""

    def __init__(self, group: _Group) -> None:
        self.members, self.gather = group.members, group.gather
        self.state, self.served = group.state(), set[_Rows]()
        self.before: _Gathered | None = None
        self.again: set[_Rows] = set()
        self.tickets, self.reductions = dict[_Rows, Tensor](), dict[_Rows, _Reduction]()
        # Of what is kept here, little as it is, checkpointing must not be told: it happens in another block's time.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            quantized = {rows: rows.quantize() for rows in group.members}
            for rows, (values, _) in quantized.items():
                self.reductions[rows] = _Reduction(rows)
                self.tickets[rows] = _Wait.apply(values, self.reductions[rows])
        with torch.no_grad():
            self.sent: Tensor | None = torch.cat([rows.record(q).flatten() for rows, (_, q) in quantized.items()])
        self.received: Tensor | None = None
        self.work: Any = None
        self.send()

    def send(self) -> None:
        """Start the all-gather."""
        assert self.sent is not None
        ranks = self.gather.mesh.size()
        self.received = self.sent.new_empty(ranks * self.sent.numel())
        group = self.gather.mesh.get_group()
        self.work = dist.all_gather_single(self.received, self.sent, group=group, async_op=True)

    def read(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, step and offset of one layer's whole weight, once they are here."""
        assert self.received is not None
        if self.work is not None:
            self.work.wait()
            self.work = None
        sizes = [member.rows_each * member.record_words for member in self.members]
        start = sum(sizes[: self.members.index(rows)])
        records = self.received.view(self.gather.mesh.size(), -1)[:, start : start + rows.rows_each * rows.record_words]
        return rows.read(records)

    def weight(self, rows: _Rows) -> Quantized:
        """The whole weight, quantized; its values' gradient goes to the ranks that hold the rows."""
        with torch.no_grad():
            codes, step, offset = self.read(rows)
            values = _values(rows, codes, step, offset)
        if len(self.served) == len(self.members):
            self.received = None
            if not self.gather.regather:
                self.sent = None
        if torch.is_grad_enabled():
            values = _Scatter.apply(self.tickets.pop(rows), values, self.reductions[rows])
        return Quantized(values, codes, step, offset)

    def regathering(self, rows: _Rows, codes: Tensor) -> AbstractContextManager[None]:
        """Inside, whatever autograd keeps of `codes` is a note where to get them again. Not under hooks of others, such
        as checkpointing's, which keep nothing anyway."""
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if not self.gather.regather or not torch.is_grad_enabled() or hooked:
            return nullcontext()
        place, shape = codes.untyped_storage().data_ptr(), codes.shape

        def pack(t: Tensor) -> Any:
            is_codes = t.dtype == torch.int8 and t.shape == shape and t.untyped_storage().data_ptr() == place
            return None if is_codes else t

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: self.codes_again(rows) if t is None else t)

    def codes_again(self, rows: _Rows) -> Tensor:
        """The codes in the backward pass; the block before is asked for its own at the same time."""
        if self.received is None:
            self.send()
        before = self.before
        if not self.again and self.gather.prefetch and before is not None and before.received is None:
            before.send()
        codes = self.read(rows)[0]
        self.again.add(rows)
        if len(self.again) == len(self.members):
            self.again, self.received = set(), None
        return codes


def _values(rows: _Rows, codes: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """The weight's values where the layer multiplies them (inputs left alone); else a stand-in of no size."""
    if rows.layer.activation_quantizer is not None:
        return step.new_zeros(()).expand(codes.shape)
    return values_of(codes, grid_of(rows.layer.weight_quantizer), step, offset, rows.dtype)


class _Reduction:
    """The gradient of one weight's values on its way to the ranks that hold the rows."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows
        self.work: Any = None

    def start(self, g: Tensor) -> None:
        """Start the reduce-scatter of `g` (O, I), the same rows to each rank as it holds."""
        rows = self.rows
        missing = rows.ranks * rows.rows_each - rows.rows
        self.kept = pad(g, (0, 0, 0, missing)) if missing else g.contiguous()  # until the message is through
        self.part = g.new_empty(rows.rows_each, rows.columns)
        group = rows.gather.mesh.get_group()
        self.work = dist.reduce_scatter_single(self.part, self.kept, group=group, async_op=True)

    def finish(self) -> Tensor:
        """The mean over ranks of this rank's rows."""
        self.work.wait()
        part, self.work = self.part[: self.rows.here].div_(self.rows.ranks), None
        self.rows.gather.reduced += 1
        del self.kept, self.part
        return part


class _Wait(torch.autograd.Function):
    """Values of this rank's rows -> a ticket. Backward: waits for their reduced gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, reduction: _Reduction) -> Tensor:
        ctx.reduction = reduction
        return values.new_zeros(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.reduction.finish(), None


class _Scatter(torch.autograd.Function):
    """A ticket and the whole weight's values -> the values. Backward: starts the reduction of their gradient."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, values: Tensor, reduction: _Reduction) -> Tensor:
        ctx.reduction, ctx.ticket = reduction, ticket.detach()
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.reduction.start(g)
        return ctx.ticket, None, None
