"""Common training techniques: each works on several devices as on one."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from support.comparison import assert_same_gradients, relative_distance
from support.processes import worker_pids

pytestmark = pytest.mark.usefixtures("float64")


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_a_gan_of_two_wrapped_models_uses_one_worker_per_device(wrap) -> None:
    nets = mlp(4, 16, 6), mlp(6, 16, 1)
    references = copy.deepcopy(nets)

    def train(generator, discriminator) -> None:
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (generator, discriminator)]
        torch.manual_seed(3)
        for _ in range(8):
            real, noise = torch.randn(7, 6), torch.randn(7, 4)
            fake = generator(noise)
            optimizers[1].zero_grad()
            (discriminator(fake.detach()).sigmoid().mean() - discriminator(real).sigmoid().mean()).backward()
            optimizers[1].step()
            for parameter in discriminator.parameters():
                parameter.requires_grad_(False)
            optimizers[0].zero_grad()
            (-discriminator(fake).sigmoid().mean()).backward()
            optimizers[0].step()
            for parameter in discriminator.parameters():
                parameter.requires_grad_(True)

    train(wrap(nets[0]), wrap(nets[1]))
    train(*references)
    assert relative_distance(nets[0], references[0]) < 1e-9
    assert relative_distance(nets[1], references[1]) < 1e-9
    assert len(worker_pids()) == 1


def test_a_student_learns_from_a_teacher(pair) -> None:
    teacher, teacher_alone = pair(mlp(5, 8, 3))
    student, student_alone = pair(mlp(5, 4, 3))
    teacher.eval()
    for t, s in ((teacher, student), (teacher_alone, student_alone)):
        optimizer = torch.optim.SGD(s.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(5):
            x = torch.randn(6, 5)
            with torch.no_grad():
                target = t(x)
            optimizer.zero_grad()
            nn.functional.mse_loss(s(x), target).backward()
            optimizer.step()
    assert relative_distance(student, student_alone) < 1e-9


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.used = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)

    def forward(self, x):
        return self.used(torch.tanh(self.trunk(x)))


def test_unused_and_frozen_parameters_keep_no_gradient(pair) -> None:
    module = Heads()
    module.trunk.weight.requires_grad_(False)
    model, reference = pair(module)
    x = torch.randn(5, 4)
    for m in (model, reference):
        m(x).sum().backward()
    assert_same_gradients(model, reference)
    assert module.unused.weight.grad is None
    assert module.trunk.weight.grad is None


def test_a_parameter_used_only_by_a_worker_gets_its_gradient(wrap) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.low(x) if x.mean() < 0 else self.high(x)

    model = wrap(Either(), check="off")
    x = torch.tensor([[-1.0, -1.0], [1.0, 2.0]])
    kept = []
    for _ in range(3):
        model.zero_grad()
        model(x).sum().backward()
        kept.append(model.high.weight.grad)
        assert model.high.weight.grad.tolist() == [[1, 2]]
        assert model.low.weight.grad.tolist() == [[-1, -1]]
    assert len({gradient.data_ptr() for gradient in kept}) == 3
    assert all(gradient.tolist() == [[1, 2]] for gradient in kept)


def test_tied_weights_get_the_sum_of_their_uses(pair) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embedding(x)))

    model, reference = pair(Tied())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for _ in range(4):
        x = torch.randint(9, (7, 3))
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            step(m, optimizer, x)
    assert relative_distance(model, reference) < 1e-9
    assert model.head.weight is model.embedding.weight


def edit_in_place(m):
    for p in m.parameters():
        p.data.clamp_(-0.05, 0.05)


def edit_by_assignment(m):
    for p in m.parameters():
        p.data = p.data * 0.5 + 0.01


def edit_without_grad(m):
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1)


def load_state(m):
    m.load_state_dict({name: torch.full_like(value, 0.02) for name, value in m.state_dict().items()})


def load_by_assignment(m):
    m.load_state_dict({n: torch.full_like(v, 0.02) for n, v in m.state_dict().items()}, assign=True)


def replace_layer(m):
    torch.manual_seed(7)
    inner = getattr(m, "module", m)
    inner[0] = nn.Linear(4, 8)


def add_layer(m):
    torch.manual_seed(7)
    getattr(m, "module", m).append(nn.Linear(3, 3))


def replace_parameter(m):
    inner = getattr(m, "module", m)
    inner[0].weight = nn.Parameter(torch.full_like(inner[0].weight, 0.03))


def change_attribute(m):
    getattr(m, "module", m)[0].forward = lambda x: torch.ones(len(x), 8)


def to_float_and_back(m):
    m.float()
    m.double()


def swap_names(m):
    inner = getattr(m, "module", m)
    inner[1] = nn.Sigmoid()


EDITS = [
    edit_in_place,
    edit_by_assignment,
    edit_without_grad,
    load_state,
    load_by_assignment,
    replace_layer,
    add_layer,
    replace_parameter,
    change_attribute,
    to_float_and_back,
    swap_names,
]


@pytest.mark.parametrize("edit", EDITS)
def test_the_next_forward_uses_an_edited_model(edit, pair) -> None:
    model, reference = pair(mlp(4, 8, 3))
    x = torch.randn(6, 4)
    model(x).sum().backward()
    reference(x).sum().backward()
    for m in (model, reference):
        edit(m)
        m.zero_grad()
    for m in (model, reference):
        m(x).pow(2).sum().backward()
    torch.testing.assert_close(model(x), reference(x))
    assert_same_gradients(model, reference)


def test_averaged_weights_may_be_swapped_in_and_out(pair) -> None:
    model, reference = pair(mlp(4, 8, 3))
    x = torch.randn(6, 4)
    averages = [[p.detach().clone() for p in m.parameters()] for m in (model, reference)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for _ in range(4):
        for m, average, optimizer in zip((model, reference), averages, optimizers, strict=True):
            step(m, optimizer, x)
            for p, a in zip(m.parameters(), average, strict=True):
                a.mul_(0.9).add_(p.data, alpha=0.1)
            for index, p in enumerate(m.parameters()):
                p.data, average[index] = average[index], p.data
        torch.testing.assert_close(model(x), reference(x))
        for m, average in zip((model, reference), averages, strict=True):
            for index, p in enumerate(m.parameters()):
                p.data, average[index] = average[index], p.data
        torch.testing.assert_close(model(x), reference(x))
    for own, other in zip(*averages, strict=True):
        torch.testing.assert_close(own, other)


def test_a_state_dict_taken_before_wrapping_shares_the_parameters(wrap) -> None:
    module = mlp(4, 8, 3)
    state = module.state_dict()
    model = wrap(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        step(model, optimizer, torch.randn(6, 4))
    assert torch.equal(state["0.weight"], module[0].weight)
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x), module(x))


def test_the_next_forward_uses_changed_attributes_and_modes(wrap) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.options, self.calls = 1.0, {"shift": 0.0}, 0
            self.table = torch.zeros(1)

        def forward(self, x):
            self.calls += 1
            return x * self.scale + self.options["shift"] + self.table + (100 if self.training else 0)

    model = wrap(Scaled())
    assert model(torch.zeros(2)).tolist() == [100, 100]
    model.eval()
    assert model(torch.zeros(2)).tolist() == [0, 0]
    model.scale = 3.0
    assert model(torch.ones(2)).tolist() == [3, 3]
    model.options["shift"] = 0.5
    assert model(torch.ones(2)).tolist() == [3.5, 3.5]
    model.table.add_(1)
    assert model(torch.ones(2)).tolist() == [4.5, 4.5]
    assert model.module.calls == 5


def test_the_next_forward_uses_changed_requires_grad(pair) -> None:
    model, reference = pair(mlp(4, 8, 3))
    x = torch.randn(6, 4)
    for frozen in (True, False, True):
        for m in (model, reference):
            m.zero_grad()
            next(iter(m.parameters())).requires_grad_(not frozen)
            m(x).sum().backward()
        assert_same_gradients(model, reference)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_clipping_and_references_to_gradients(set_to_none: bool, pair) -> None:
    model, reference = pair(mlp(4, 8, 3))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, reference)]
    norms: list[list[float]] = [[], []]
    kept = []
    for number in range(12):
        x = torch.randn(5, 4)
        for index, m in enumerate((model, reference)):
            (m(x).pow(2).mean() / 3).backward()
            if number % 3 == 2:
                norms[index].append(float(nn.utils.clip_grad_norm_(m.parameters(), 0.1)))
                optimizers[index].step()
                if index == 0:
                    kept.append((m.module[0].weight.grad, m.module[0].weight.grad.clone()))
                optimizers[index].zero_grad(set_to_none)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert relative_distance(model, reference) < 1e-9
    if set_to_none:
        assert all(torch.equal(gradient, then) for gradient, then in kept)


def test_autocast_and_a_gradient_scaler_work(pair) -> None:
    model, reference = pair(mlp(4, 32, 3).float())
    x = torch.randn(8, 4, dtype=torch.float32)
    results = []
    for m in (model, reference):
        optimizer, scaler = torch.optim.SGD(m.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = m(x)
            assert out.dtype is torch.bfloat16
            scaler.scale(out.float().pow(2).mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(out.float())
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_inside_the_model(use_reentrant: bool, pair) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), mlp(8, 8, 3)

        def forward(self, x):
            return checkpoint(
                self.second,
                checkpoint(self.second[0], self.first(x), use_reentrant=use_reentrant),
                use_reentrant=use_reentrant,
            )

    model, reference = pair(Checkpointed())
    x = torch.randn(6, 4)
    for m in (model, reference):
        m(x).pow(2).sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_around_the_model(use_reentrant: bool, pair) -> None:
    model, reference = pair(mlp(4, 8, 4))
    x = torch.randn(6, 4, requires_grad=True)
    for m in (model, reference):
        checkpoint(m, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert_same_gradients(model, reference)
    assert model(x).shape == (6, 4)


def test_parameter_hooks_get_the_whole_gradient_once(pair) -> None:
    model, reference = pair(mlp(4, 8, 3))
    x = torch.randn(6, 4)
    seen = []
    for m in (model, reference):
        weight = next(iter(m.parameters()))
        weight.register_hook(lambda g: (seen.append(g.clone()), g * 2)[1])
        m(x).sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(model.module[0].weight.grad, reference[0].weight.grad)


def test_forward_hooks_added_between_calls_run_on_every_device(wrap) -> None:
    model = wrap(nn.Linear(2, 2), check="off")
    x = torch.randn(4, 2)
    before = model(x)
    handle = model.module.register_forward_hook(lambda _, __, out: out * 10)
    torch.testing.assert_close(model(x), before * 10)
    handle.remove()
    torch.testing.assert_close(model(x), before)


def test_dropout_differs_between_devices_and_repeats_with_the_seed(wrap) -> None:
    model = wrap(nn.Dropout(0.5))

    def run() -> torch.Tensor:
        torch.manual_seed(5)
        return torch.stack([model(torch.ones(8, 50)) for _ in range(3)])

    first, second = run(), run()
    assert torch.equal(first, second)
    assert not torch.equal(first[0, :4], first[0, 4:])
    assert not torch.equal(first[0], first[1])


def test_the_users_generator_advances_as_with_the_first_chunk_alone(wrap) -> None:
    model = wrap(nn.Dropout(0.5))
    torch.manual_seed(5)
    model(torch.ones(8, 50))
    after = torch.rand(3)
    torch.manual_seed(5)
    model.module(torch.ones(4, 50))
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_normalized_weights_are_computed_on_every_device(norm, pair) -> None:
    model, reference = pair(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), norm(nn.Linear(8, 3)))
        if norm is not nn.utils.weight_norm
        else Normalized()
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for _ in range(3):
        x = torch.randn(6, 4)
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            step(m, optimizer, x)
    assert relative_distance(model, reference) < 1e-9


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        return x @ (self.gain * self.layer.weight / self.layer.weight.norm(dim=1, keepdim=True)).t()


class Momentum(nn.Module):
    """Like MoCo: its forward updates a second encoder from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 3)
        self.key.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            target = self.key(x)
        return (self.query(x) - target).pow(2).mean(1)


def test_a_forward_that_writes_to_parameters_writes_once(pair) -> None:
    model, reference = pair(Momentum())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for number in range(6):
        x = torch.randn(6, 4)
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).mean().backward()
            if number != 0:
                optimizer.step()
    assert relative_distance(model, reference) < 0.05
    torch.testing.assert_close(model.key.weight, reference.key.weight, rtol=1e-3, atol=1e-3)


def test_sparse_gradients_arrive(pair) -> None:
    model, reference = pair(nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)))
    x = torch.randint(10, (6, 2))
    for m in (model, reference):
        m(x).pow(2).sum().backward()
    torch.testing.assert_close(model.module[0].weight.grad.to_dense(), reference[0].weight.grad.to_dense())


def test_lazy_layers_get_their_shape_from_the_first_batch(wrap) -> None:
    model = wrap(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)))
    x = torch.randn(6, 3)
    assert model(x).shape == (6, 2)
    torch.testing.assert_close(model(x), model.module(x))
