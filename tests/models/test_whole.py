"""Evaluation of a model in one piece: where it serves, that its logits are the model's, that it sees every change."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spikingformer.models import whole
from spikingformer.native import available_isas, status
from spikingformer.native.library import use_isa
from spikingformer.neurons import use_backend
from tests.engine.helpers import small

pytestmark = pytest.mark.skipif(not status().available, reason=f"no compiled kernels: {status().reason}")

NAMES = [
    f"{f}{p}_{s}" for f in ("spikformer", "spikingformer") for p in ("", "_cml") for s in ("4_384", "8_384", "2_256")
]


@pytest.fixture(autouse=True)
def served(monkeypatch) -> list[bool]:
    """Whether each call of a model so far was served in one piece."""
    from spikingformer.models import base

    calls: list[bool] = []

    def run_whole(model: nn.Module, x: Tensor) -> Tensor | None:
        result = whole.run_whole(model, x)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(base, "run_whole", run_whole)
    return calls


def one_by_one(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The logits of a model's method with every module called: a hook that does nothing looks at one of them."""
    with call.__self__.blocks[0].register_forward_hook(lambda *_: None), torch.no_grad():  # type: ignore[attr-defined]
        return call(x)


def assert_same_logits(got: Tensor, want: Tensor) -> None:
    # float32 sums in another order: 1e-6 of the logits' size; a flipped spike would be far above it
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


def assert_served_and_right(model: nn.Module, x: Tensor, served: list[bool]) -> Tensor:
    with torch.no_grad():
        got = model(x)
    assert served[-1]
    assert_same_logits(got, one_by_one(model.forward, x))
    assert not served[-1], "the other way must not be the same one"
    return got


# ---- where it serves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_modules(name, served):
    model, x = small(name, batch=2)
    with torch.no_grad():
        last, steps = model(x), model.forward_steps(x)
    assert served[-2:] == [True, True]
    assert_same_logits(steps, one_by_one(model.forward_steps, x))
    assert_same_logits(last, one_by_one(model.forward, x))
    assert served[-2:] == [False, False]
    assert torch.equal(steps[-1], last)
    assert last.std() > 1e-3


@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set_in_turn(isa, served):
    model, x = small(batch=2)
    assert_served_and_right(model, x, served)
    with use_isa(isa):
        assert_served_and_right(model, x, served)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode], ids=["no_grad first", "inference_mode first"])
def test_serves_without_gradients_in_either_mode(first, served):
    model, x = small(batch=2)
    logits = []
    for mode in (first, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            logits.append(model(x))
            assert logits[-1].is_inference() == (mode is torch.inference_mode)
    assert served[-4:] == [True] * 4
    assert all(torch.equal(y, logits[0]) for y in logits)


def test_serves_sizes_batches_and_layouts_as_they_come(served):
    model, x = small(batch=2)
    for part in (x[:1], x[:0], torch.randn(3, 3, 48, 32), x.to(memory_format=torch.channels_last), x[..., ::2, ::2]):
        with torch.no_grad():
            got = model(part)
        assert served[-1]
        assert got.shape == (len(part), 7)
        if len(part):
            assert_same_logits(got, one_by_one(model.forward, part))


@pytest.mark.parametrize(("scale", "in_one_piece"), [(0.125, True), (1e-5, False)])
def test_attention_over_more_tokens_than_int16_counts(scale, in_one_piece, served):
    kwargs = {"embed_dim": 8, "num_heads": 1, "depth": 1, "pooled_stages": (), "time_steps": 1, "img_size": 8}
    model, _ = small(attention_scale=scale, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.data.fill_(5.0)  # every neuron fires: attention counts as many tokens as pixels
    x = torch.randn(1, 3, 182, 182)
    with torch.no_grad():
        got = model(x)
    assert served[-1] == in_one_piece
    assert_same_logits(got, one_by_one(model.forward, x))


def test_a_model_with_gradients_is_called_module_by_module(served):
    model, x = small(batch=2)
    model(x).sum().backward()
    assert not served[-1]
    assert model.stem.stages[0].conv.weight.grad.abs().sum() > 0


def test_a_model_in_train_mode_is_called_module_by_module(served):
    model, x = small(batch=2)
    with torch.no_grad():
        model.train()(x)
        assert not served[-1]
        model.eval().blocks[1].mlp.train()  # one part alone
        before = model.blocks[1].mlp.fc1.bn.num_batches_tracked.item()
        model(x)
    assert not served[-1]
    assert model.blocks[1].mlp.fc1.bn.num_batches_tracked == before + 1


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: use_backend("reference"),
        lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
    ],
    ids=["autocast", "reference backend", "global hook", "global pre-hook"],
)
def test_surroundings_that_look_at_modules_or_change_the_arithmetic(surroundings, served):
    model, x = small(batch=2)
    with torch.no_grad(), surroundings():
        model(x)
    assert not served[-1]
    with torch.no_grad():
        model(x)
    assert served[-1]


def test_float64_is_called_module_by_module(served):
    model, x = small(batch=2)
    with torch.no_grad():
        want = model(x)
        assert model.double()(x.double()).dtype == torch.float64
        assert not served[-1]
        torch.testing.assert_close(model.float()(x), want)
    assert served[-1]


def submodules(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_on_any_module(hook, served):
    model, x = small(depth=1, batch=2)
    for name in submodules(model):
        with getattr(model.get_submodule(name), hook)(lambda *_: None), torch.no_grad():
            model(x)
        assert not served[-1], name
    with torch.no_grad():
        model(x)
    assert served[-1], "hooks that are gone do not count"


def test_hooks_see_what_they_should(served):
    model, x = small(batch=2)
    seen = []
    with torch.no_grad():
        model(x)
        model.blocks[0].mlp.fc1.lif.register_forward_hook(lambda m, i, o: seen.append(o.mean().item()))
        model(x)
    assert served[-2:] == [True, False]
    assert len(seen) == 1
    assert 0 < seen[0] < 1


def test_a_replaced_forward_is_called(served):
    model, x = small(batch=2)
    with torch.no_grad():
        before = model(x)
        mlp = model.blocks[1].mlp
        mlp.forward = lambda x, state=None: torch.zeros_like(x)
        changed = model(x)
        assert not served[-1]
        assert not torch.allclose(changed, before)
        del mlp.forward
        assert torch.equal(model(x), before)


def test_a_replaced_method_of_the_model_is_called(served):
    model, x = small(batch=2)
    with torch.no_grad():
        before = model(x)
        model.forward_head = lambda features, pre_logits=False: features.sum((0, 2, 3, 4))[:, None]
        assert model(x).shape == (2, 1)
        del model.forward_head
        assert torch.equal(model(x), before)


class DoublingConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_subclass_is_called(served):
    model, x = small(batch=2)
    with torch.no_grad():
        before = model(x)
        conv = model.blocks[0].mlp.fc1.conv
        conv.__class__ = DoublingConv
        assert not torch.allclose(model(x), before)
        assert not served[-1]
        conv.__class__ = nn.Conv2d
        assert torch.equal(model(x), before)
        model.head.__class__ = OwnHead
        torch.testing.assert_close(model(x), before + 1)
        assert not served[-1]


class CountingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_an_active_dispatch_mode_sees_every_operation(served):
    model, x = small(batch=2)
    with torch.no_grad():
        want = model(x)
        with CountingMode() as mode:
            got = model(x)
    assert not served[-1]
    assert_same_logits(got, want)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert sum("convolution" in name for name in mode.names) == convolutions


def test_counting_operations_sees_the_modules(served):
    from spikingformer.energy.counting import count_operations

    model, x = small(batch=2)
    with torch.no_grad():
        model(x)
    counted = count_operations(model, [x])
    assert not served[-1]
    assert counted.products == count_operations(small(batch=2)[0], [x]).products


def test_compilation_and_export_trace_the_modules(served):
    model, x = small(depth=1, batch=2)
    with torch.no_grad():
        want = model(x)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        got = torch.compile(model, backend=backend)(x)
        exported = torch.export.export(model, (x,))
    assert sum(len(g.graph.nodes) for g in graphs) > 50
    assert_same_logits(got, want)
    assert_same_logits(exported.module()(x).detach(), want)


def test_a_vectorised_or_transformed_call_goes_through_the_modules(served):
    model, x = small(depth=1, batch=2)
    with torch.no_grad(), use_backend("reference"):
        want = torch.stack([model(part[None]) for part in x])
    with torch.no_grad():
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        called = torch.func.functional_call(model, state, (x,))
        doubled = torch.func.functional_call(model, {**state, "head.bias": state["head.bias"] + 1}, (x,))
    assert_same_logits(called, want[:, 0])
    torch.testing.assert_close(doubled, called + 1)


def test_weights_of_another_tensor_class_go_through_the_modules(served):
    """Quantised and distributed weights are such: they have no memory of their own."""
    model, x = small(depth=1, batch=2)
    with torch.no_grad():
        want = model(x)
        weight = model.head.weight.detach()
        model.head.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        assert model.head.weight.data_ptr() == 0
        got = model(x)
    assert not served[-1]
    assert_same_logits(got.a, want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["stem.stages.0", "stem.stages.1", "blocks.0.attn.q", "blocks.0.mlp.fc2"])
def test_a_product_with_weights_of_another_tensor_class(name, training):
    model, x = small(depth=1, batch=2)
    model.train(training)
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
        conv = model.get_submodule(name).conv
        weight = conv.weight.detach()
        conv.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
        model.get_submodule(name).bn.register_forward_pre_hook(lambda _, args: args[0].a)
        assert_same_logits(model(x), want)


def test_a_negated_view_is_read_as_what_it_stands_for(served):
    model, x = small(depth=1, batch=2)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        want = model(-x)
        assert_same_logits(model(negated), want)
    assert_same_logits(one_by_one_of_any(model, negated), want)


def test_errors_are_those_of_the_modules():
    model, x = small(batch=2)
    with torch.no_grad():
        with pytest.raises(ValueError, match="the model takes 3 channels, got 2"):
            model(x[:, :2])
        with pytest.raises(ValueError, match="multiples of 4"):
            model(x[..., :30, :])
        with pytest.raises(ValueError, match=r"expected pictures \(B, C, H, W\)"):
            model(x[0])


class SilentMLP(nn.Module):
    def forward(self, x: Tensor, state: object = None) -> Tensor:
        return torch.zeros_like(x)


# ---- changes of the model -------------------------------------------------------------------------------------------


def optimiser_step(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    optimizer.step()


def training_step(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():  # nothing but BatchNorm's buffers moves
        model.train()(torch.randn_like(x) * 3 + 1)
    model.eval()


def other_weights(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(5)
    state = {k: v + 0.2 * torch.rand_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def assigned_weights(model: nn.Module, x: Tensor) -> None:
    state = {k: v * 1.2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def through_data(model: nn.Module, x: Tensor) -> None:
    for p in model.parameters():
        p.data.mul_(1.1)


def a_few_rows_through_data(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.fc1.conv.weight.data[3:9] *= -1


def one_weight_through_data(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.fc2.conv.weight.data[5, 77] = 50.0


def new_data(model: nn.Module, x: Tensor) -> None:
    for p in model.parameters():
        p.data = p.data * 1.1


def same_memory_turned(model: nn.Module, x: Tensor) -> None:
    weight = model.blocks[0].attn.proj.conv.weight  # as many channels in as out
    weight.data = weight.data.transpose(0, 1)


def one_parameter_replaced(model: nn.Module, x: Tensor) -> None:
    fc1 = model.blocks[0].mlp.fc1
    fc1.conv.weight = nn.Parameter(-fc1.conv.weight.detach())


def one_buffer_replaced(model: nn.Module, x: Tensor) -> None:
    bn = model.blocks[0].mlp.fc1.bn
    bn.running_mean = bn.running_mean + 1


def another_class(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.__class__ = SilentMLP


def one_bias_through_data(model: nn.Module, x: Tensor) -> None:
    model.head.bias.data[3] += 1


def one_weight_in_place(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.conv.weight[:, 5] += 0.5


def through_numpy(model: nn.Module, x: Tensor) -> None:
    model.head.weight.detach().numpy()[:] *= 1.5


def new_head(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    model.reset_classifier(5)


def own_head(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    model.head = nn.Sequential(nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 4))


def head_without_bias(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    model.head = nn.Linear(72, 4, bias=False)


def other_threshold(model: nn.Module, x: Tensor) -> None:
    for neuron in model.neurons():
        neuron.config = replace(neuron.config, v_threshold=0.7 * neuron.config.v_threshold)


def one_threshold(model: nn.Module, x: Tensor) -> None:
    neuron = model.blocks[0].attn.k.lif  # beside q's and v's
    neuron.config = replace(neuron.config, v_threshold=0.3)


def more_time_steps(model: nn.Module, x: Tensor) -> None:
    model.time_steps = 6


def other_eps(model: nn.Module, x: Tensor) -> None:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.5


def other_attention_scale(model: nn.Module, x: Tensor) -> None:
    for block in model.blocks:
        block.attn.scale = 0.0001


def fewer_blocks(model: nn.Module, x: Tensor) -> None:
    model.blocks = model.blocks[:1]


def no_norm(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.fc1.bn = nn.Identity()


def no_pool(model: nn.Module, x: Tensor) -> None:
    model.stem.stages[2].pool = None


def one_more_pool(model: nn.Module, x: Tensor) -> None:
    model.stem.stages[0].pool = "cml"


def other_dictionary_of_parameters(model: nn.Module, x: Tensor) -> None:
    conv = model.blocks[0].mlp.fc1.conv
    conv._parameters = {k: v if v is None else nn.Parameter(-v.detach()) for k, v in conv._parameters.items()}


def own_forward_for_a_note(model: nn.Module, x: Tensor) -> None:
    mlp = model.blocks[0].mlp
    mlp.note = []
    with torch.no_grad():
        model(x)
    del mlp.note
    mlp.forward = lambda x, state=None: torch.zeros_like(x)


def another_norm(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.fc1.bn = nn.GroupNorm(1, 288).eval()


def norm_without_scale(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.fc1.bn = nn.BatchNorm2d(288, affine=False).eval()


def norm_without_statistics(model: nn.Module, x: Tensor) -> None:
    model.blocks[0].mlp.fc1.bn = nn.BatchNorm2d(288, track_running_stats=False).eval()


def folded(model: nn.Module, x: Tensor) -> None:
    from spikingformer.export.fold import fold_batch_norm

    copied = fold_batch_norm(model)
    model.stem, model.blocks = copied.stem, copied.blocks


def pruned(model: nn.Module, x: Tensor) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.head, "weight", 0.5)


def parametrized(model: nn.Module, x: Tensor) -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(model.head, "weight", Doubled())


CHANGES = [
    optimiser_step, training_step, other_weights, assigned_weights, through_data, a_few_rows_through_data,
    one_weight_through_data, new_data, same_memory_turned, one_parameter_replaced, one_buffer_replaced,
    another_class, one_bias_through_data,
    one_weight_in_place, through_numpy, new_head, own_head, head_without_bias, other_threshold, one_threshold,
    more_time_steps, other_eps, other_attention_scale, fewer_blocks, no_norm, no_pool, one_more_pool,
    other_dictionary_of_parameters, own_forward_for_a_note, another_norm, norm_without_scale,
    norm_without_statistics, folded, pruned, parametrized,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.replace("_", " "))
@pytest.mark.parametrize("name", ["spikingformer_cml_4_384", "spikformer_4_384"])
def test_logits_follow_every_change_of_the_model(name, change, served):
    model, x = small(name, batch=2)
    before = assert_served_and_right(model, x, served)
    change(model, x)
    model.eval()  # new modules come in train mode
    want = one_by_one_of_any(model, x)
    with torch.no_grad():
        got = model(x)
    assert got.shape == want.shape
    if change is not folded:
        assert want.shape != before.shape or (want - before).abs().max() > 1e-3 * before.abs().max(), "nothing changed"
    assert_same_logits(got, want)


def one_by_one_of_any(model: nn.Module, x: Tensor) -> Tensor:
    with model.register_forward_hook(lambda *_: None), torch.no_grad():
        return model(x)


def test_a_step_back_gives_the_first_logits_again(served):
    model, x = small(batch=2)
    before = assert_served_and_right(model, x, served)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    other_weights(model, x)
    assert not torch.allclose(assert_served_and_right(model, x, served), before)
    model.load_state_dict(first)
    assert torch.equal(assert_served_and_right(model, x, served), before)


def test_training_with_an_evaluation_after_every_step(served):
    model, x = small(batch=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        torch.nn.functional.cross_entropy(model.train()(x), torch.tensor([1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(assert_served_and_right(model.eval(), x, served))
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])


# ---- the model as an object -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_used_model(duplicate, served):
    model, x = small(batch=2)
    before = assert_served_and_right(model, x, served)
    copied = duplicate(model)
    assert torch.equal(assert_served_and_right(copied, x, served), before)
    through_data(copied, x)
    assert not torch.allclose(assert_served_and_right(copied, x, served), before)
    assert torch.equal(assert_served_and_right(model, x, served), before), "the original does not see its copy"


def test_threads_that_call_one_model_at_once(served):
    model, x = small(batch=2)
    inputs = [torch.randn(1 + i % 2, *x.shape[1:]) for i in range(4)]
    wants = [one_by_one(model.forward, part) for part in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        for _ in range(10):
            with torch.no_grad():
                results[i].append(model(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, want in zip(results, wants, strict=True):
        assert len(got) == 10
        for y in got:
            assert_same_logits(y, want)


def test_a_call_while_another_is_inside_goes_through_the_modules(served):
    model, x = small(batch=2)
    with torch.no_grad():
        want = model(x)
        engine = whole._ready[model].run.__self__
        with engine._lock:
            got = model(x)
        assert served[-2:] == [True, False]
        assert_same_logits(got, want)
        model(x)
    assert served[-1], "the lock is free again"


def test_a_failed_call_frees_the_model(served):
    model, x = small(batch=2)
    with torch.no_grad():
        model(x)
        with pytest.raises(ValueError, match="multiples of 4"):
            model(x[..., :30, :])
        model(x)
    assert served[-1]


def test_logits_are_the_callers_own(served):
    model, x = small(batch=2)
    with torch.no_grad():
        first = model(x)
        kept = first.clone()
        steps = model.forward_steps(x)
        other = model(-x)
    assert served[-3:] == [True] * 3
    assert torch.equal(first, kept), "a later call does not write into them"
    assert not torch.allclose(other, kept)
    steps.zero_()
    first.requires_grad_()
    first.square().sum().backward()
    torch.testing.assert_close(first.grad, 2 * kept)
    weight = torch.ones(7, requires_grad=True)
    (other * weight).sum().backward()
    torch.testing.assert_close(weight.grad, other.sum(0))


def test_dead_models_are_not_kept(served):
    model, x = small(batch=2)
    with torch.no_grad():
        model(x)
    assert served[-1]
    gc.collect()
    known = len(whole._ready)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert len(whole._ready) == known - 1


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def see(self, *_: object) -> None:
        pass


def with_owner(model: nn.Module) -> None:
    model.owner = Trainer(model)


def block_with_owner(model: nn.Module) -> None:
    model.blocks[0].owner = Trainer(model)


def gradient_hook(model: nn.Module) -> None:
    model.head.weight.register_hook(Trainer(model).see)


@pytest.mark.parametrize("refer_back", [with_owner, block_with_owner, gradient_hook])
def test_models_that_refer_to_themselves_are_not_kept(refer_back, served):
    model, x = small(batch=2)
    refer_back(model)
    with torch.no_grad():
        model(x)
    assert served[-1]
    model.register_forward_hook(Trainer(model).see)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None


def test_other_models_do_not_disturb(served):
    (one, x), (two, _) = small(batch=2), small("spikformer_4_384")
    with torch.no_grad():
        a, b = one(x), two(x)
        assert torch.equal(one(x), a)
        assert torch.equal(two(x), b)
    assert served[-4:] == [True] * 4


def test_nothing_serves_without_a_provider(served, monkeypatch):
    model, x = small(batch=2)
    monkeypatch.setattr(whole, "_make", None)
    with torch.no_grad():
        model(x)
    assert not served[-1]


def test_a_configuration_from_json_with_lists():
    model = timm.create_model(
        "spikingformer_cml_4_384", embed_dim=32, depth=1, num_heads=2, img_size=[16, 16], pooled_stages=[2, 3]
    ).eval()
    assert model.config.pooled_stages == (2, 3)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
