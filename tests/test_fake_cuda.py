"""Steps on a GPU that is not there: tensors without content on the device "cuda".

Devices that do not fit together are an error; what makes the host wait for the device is counted.
"""

import contextlib
import dataclasses
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from dense import training
from dense.data import Example
from eval_monodepth import silog_loss
from feature_bank import PooledFeatures
from semseg.metrics import segmentation_loss
from students import Batch, Objective, Student, StudentTrainer
from teachers import teacher_tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pixio
from pixio.dense import FrozenEncoder, Predictor, make_head
from pixio.dense.outputs import Classes
from pixio.engine import runtime as runtime_module
from pixio.engine.optim import fused_adamw, make_adamw
from pixio.engine.prefetch import Prefetch
from pixio.engine.runtime import Runtime
from pixio.engine.step import Agreement, accumulate, apply_gradients, compute_gradients
from pixio.features import knn
from pixio.images import normalization
from pixio.images.normalization import normalize

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_ensureCUDADeviceGuardSet") and not torch.cuda.is_available(),
    reason="torch 2.8 asks the driver for the device of a fake tensor",
)
CUDA = torch.device("cuda", 0)
RUNTIME = Runtime(CUDA, torch.bfloat16)
STEPS = 3
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts what the host waits for, by kind: events, numbers, blocking copies, lengths of results."""

    def __init__(self, counts: Counter, answer: bool) -> None:
        super().__init__()
        self.counts, self.answer = counts, answer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            self.counts["number"] += args[0].device.type == "cuda"
            return self.answer if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 1
        composite = (func.name(), "CompositeImplicitAutograd")
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(*composite):
            with self:  # where gradients are off, what it consists of has not been called yet
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is aten._to_copy.default or func is aten.copy_.default:
            source = args[0] if func is aten._to_copy.default else args[1]
            blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            self.counts["blocking copy"] += blocks and source.device != out.device
        self.counts["length"] += func in (aten.nonzero.default, aten.bincount.default)
        return out


def backward(loss: Tensor) -> None:
    """Stands for `Tensor.backward`, whose engine does not run without a device: calls each node in turn.

    As there, gradients take the shape and the type of what they are gradients of, and are then added.
    """
    waiting: Counter = Counter()  # for the gradients of how many nodes each waits
    nodes, seen = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        followers = [node for node, _ in nodes.pop().next_functions if node is not None]
        waiting.update(followers)
        nodes += [node for node in followers if node not in seen]
        seen.update(followers)
    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        inputs = [given.get(i) for i in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            grad = node.variable.grad
            node.variable.grad = inputs[0] if grad is None else grad + inputs[0]
            continue
        outputs = node(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for (follower, i), gradient in zip(node.next_functions, outputs, strict=True):
            if follower is None:
                continue
            if gradient is not None:
                meta, sums = follower._input_metadata[i], gradients.setdefault(follower, {})
                assert gradient.device == meta.device
                gradient = gradient.sum_to_size(meta.shape).to(meta.dtype)
                sums[i] = sums[i] + gradient if i in sums else gradient
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """What `Waits` counts; streams, events and autocast of a GPU are there."""
    counts = Counter()
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: counts.update(["event"]))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(runtime_module, "_copy_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr(Tensor, "backward", lambda loss: backward(loss))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    normalization._statistics.cache_clear()
    yield counts
    normalization._statistics.cache_clear()


@contextlib.contextmanager
def fake_gpu(counts: Counter, *models: nn.Module, answer: bool = True):
    """Inside, all tensors are fake, those of `models` are on the GPU, and `answer` is read of each bool."""
    described = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in models]
    with FakeTensorMode(), Waits(counts, answer):
        for model, tensors in zip(models, described, strict=True):
            state = {name: torch.empty(s, dtype=dtype, device=CUDA) for name, (s, dtype) in tensors.items()}
            model.load_state_dict(state, assign=True)
        normalize(torch.empty(1, 3, 1, 1, dtype=torch.uint8, device=CUDA))  # whose constants are kept
        counts.clear()
        yield


def assert_waits(counts: Counter, **expected: int) -> None:
    assert {kind: number for kind, number in counts.items() if number} == expected


class Images:
    """A loader of batches in host memory."""

    def __init__(self) -> None:
        self.counts = {}

    def __iter__(self):
        while True:
            yield {"images": torch.empty(2, 3, 64, 64, dtype=torch.uint8)}

    def state_dict(self) -> None: ...


def encoder() -> pixio.PixioViT:
    return pixio.PixioViT(img_size=64, embed_dim=32, depth=4, num_heads=2, n_cls_tokens=2, drop_path=0.1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_of_pretraining_waits_once_for_the_step_before(counts, monkeypatch, ranks):
    reduced = []
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    runtime = dataclasses.replace(RUNTIME, world_size=ranks)
    with torch.device("meta"):
        mae = pixio.PixioMAE(encoder(), 32, 2, 2, mask_grid=2)
    with fake_gpu(counts, mae):
        optimizer, agreement = make_adamw(mae, 1e-3), Agreement(runtime)
        for micro_batches in Prefetch(Images(), runtime, 2, range(STEPS)):
            accumulate(
                runtime,
                mae,
                optimizer,
                runtime.make_scaler(),
                micro_batches,
                lambda model, batch: model(normalize(batch["images"])).loss,
                1.0,
                agreement,
            )
    assert_waits(counts, event=STEPS - 1)
    assert len(reduced) == (STEPS if ranks == 2 else 0)


def test_a_step_of_distillation_waits_once_for_the_step_before(counts):
    with torch.device("meta"):
        teacher = encoder().requires_grad_(False).eval()
        students = [Student(encoder(), 32) for _ in range(2)]
    losses = {"loss_fn_cls": "cosine", "loss_fn_patch": "mse", "loss_fuse": "sum"}
    with fake_gpu(counts, teacher, *students):
        trainers = [
            StudentTrainer(str(i), student, Objective((4, 4), ratio, 2, losses), 1e-3, RUNTIME, 0.05)
            for i, (student, ratio) in enumerate(zip(students, (0.5, 0.0), strict=True))
        ]
        agreement = Agreement(RUNTIME)
        for (batch,) in Prefetch(Images(), RUNTIME, 1, range(STEPS)):
            images = normalize(batch["images"])
            with RUNTIME.autocast():
                micro_batches = [Batch(images, teacher_tokens(teacher, images, (4, 4)))]
            gradients = {
                each.name: compute_gradients(
                    RUNTIME, each.model, each.optimizer, each.scaler, micro_batches, each.loss_fn
                )
                for each in trainers
            }
            apply_gradients(RUNTIME, gradients, None, agreement)
    assert_waits(counts, event=STEPS - 1)


@pytest.mark.parametrize(("head", "task"), [("linear", "semseg"), ("dpt", "monodepth")])
def test_a_step_of_head_training_waits_once_for_the_step_before(counts, head, task):
    depth = task == "monodepth"
    with torch.device("meta"):
        frozen = FrozenEncoder(encoder(), [0, 1, 2, 3] if head == "dpt" else [3])
        head = make_head(head, frozen.channels, 1 if depth else 5)
    silog = partial(silog_loss, min_depth=0.1, max_depth=10.0)
    with fake_gpu(counts, frozen, head):
        probe = SimpleNamespace(
            runtime=RUNTIME,
            frozen=frozen,
            config=SimpleNamespace(batch_size=2, tunes=False),
            task=SimpleNamespace(
                loss=(lambda logits, target: silog(logits[:, 0], target)) if depth else segmentation_loss
            ),
        )
        optimizer = fused_adamw(head.parameters(), 1e-3, (0.9, 0.999), 0.01)
        agreement = Agreement(RUNTIME)
        for _ in range(STEPS):
            target = torch.empty(4, 64, 64, dtype=torch.float32 if depth else torch.uint8)
            crops = Example([""] * 4, torch.empty(4, 3, 64, 64, dtype=torch.uint8), target)
            step = (RUNTIME, head, optimizer, RUNTIME.make_scaler(), [crops])
            accumulate(*step, partial(training.loss_of, probe), None, agreement)
    assert_waits(counts, event=STEPS - 1)


def test_sliding_windows_wait_once_for_each_row_of_windows(counts):
    with torch.device("meta"):
        frozen = FrozenEncoder(encoder(), [3])
        head = make_head("linear", frozen.channels, 3).eval()
    with fake_gpu(counts, frozen, head):
        classes = Classes(("a", "b", "c"), ((0, 0, 0),) * 3)
        predictor = Predictor(frozen, head, classes, (64, 32), RUNTIME)
        assert predictor.predict(torch.empty(3, 96, 128, dtype=torch.uint8)).shape == (96, 128)
    assert_waits(counts, number=3)  # rows at 0, 32, 64: all finite?


def test_features_wait_for_nothing_and_a_search_twice_for_each_block(counts):
    with torch.device("meta"):
        model = encoder().eval()
    spec = PooledFeatures(64, 64, "cls", (0, 3))
    with fake_gpu(counts, model, answer=False), torch.no_grad():
        images = torch.empty(4, 3, 64, 64, dtype=torch.uint8).to(CUDA, non_blocking=True)
        with RUNTIME.autocast():
            arrays = spec.compute(model, images)
        assert_waits(counts)
        search = knn.Nearest(arrays["block_3"].float(), 2)
        search.add(torch.empty(64, 32, device=CUDA), 0)
        similarities, _ = search.result()
        labels = torch.empty(4, 2, dtype=torch.int64, device=CUDA)
        for scores in knn.class_scores(similarities, labels, [1, 2], 0.07, 5):
            assert scores.shape == (4, 5)
    assert_waits(counts, number=2)  # how many groups hold something better, and whether any are equal
