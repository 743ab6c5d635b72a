"""On a CUDA device: no host synchronisation in step, capture in a CUDA graph, the same numbers as on the CPU."""

import pytest
import torch

from hf_sl2o import LearnedOptimizer, SubspaceOptimizer, Trajectory, fit_basis

from .conftest import random_dense
from .test_optim_learned import net, rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


def backward(model, seed):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).device)
    model.zero_grad(set_to_none=False)
    (model(x) - x[:, :1]).square().mean().backward()


def test_step_never_waits_for_the_device_and_equals_the_cpu():
    ends = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        basis = random_dense(model.named_parameters(), dim=4)
        optimizer = SubspaceOptimizer(model.named_parameters(), basis, rule(), average=4.0)
        for step in range(2):
            backward(model, step)
            optimizer.step()
        backward(model, 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ends.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_moves_to_the_device_after_its_optimizer_was_made():
    for make in (
        lambda model: SubspaceOptimizer(
            model.named_parameters(), random_dense(model.named_parameters(), dim=4), rule(), average=4.0
        ),
        lambda model: LearnedOptimizer(model.parameters(), rule(), average=4.0),
    ):
        ends = []
        for device in ("cpu", "cuda"):
            model = net()
            optimizer = make(model)
            backward(model, 0)
            optimizer.step()
            model.to(device)
            for step in (1, 2):
                backward(model, step)
                optimizer.step()
            optimizer.use_average()
            ends.append([p.detach().cpu() for p in model.parameters()])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_capturable_step_in_a_cuda_graph():
    model, twin = net().cuda(), net().cuda()
    optimizer = LearnedOptimizer(model.parameters(), rule(), capturable=True, average=4.0)
    plain = LearnedOptimizer(twin.parameters(), rule(), capturable=True, average=4.0)
    for m, o in ((model, optimizer), (twin, plain)):
        backward(m, 0)
        o.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    plain.step()
    for one in (optimizer, plain):
        one.use_average()
    torch.cuda.synchronize()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_basis_fitted_on_the_device_equals_the_one_of_the_cpu(tmp_path):
    model, trajectory = net(), Trajectory(tmp_path)
    for step in range(8):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        trajectory.write(step, model.named_parameters())
    one, other = (fit_basis(trajectory, 5, device=device, progress=False) for device in ("cpu", "cuda"))
    torch.testing.assert_close(one.units, other.units.cpu())
    torch.testing.assert_close(one.as_matrix(), other.as_matrix().cpu(), rtol=1e-5, atol=1e-6)
