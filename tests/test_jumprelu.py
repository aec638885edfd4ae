"""JumpReLU and step: forward values, and pseudo-derivatives against numbers worked out by hand."""

import torch

from mistudio.sae import jumprelu, step

EPS = 0.2
THETA = torch.tensor([0.5], dtype=torch.float64)
# θ = 0.5, ε = 0.2: the window is 0.4 < z < 0.6.   below   lower half  θ    upper half  above
Z = torch.tensor([[0.2], [0.45], [0.5], [0.55], [0.9]], dtype=torch.float64)


def gradients(function, z, theta, d_out, eps=EPS):
    z, theta = z.clone().requires_grad_(), theta.clone().requires_grad_()
    out = function(z, theta, eps)
    out.backward(d_out) if out.requires_grad else None
    return z.grad, theta.grad


def test_jumprelu_keeps_z_strictly_above_the_threshold():
    assert jumprelu(Z, THETA, EPS).tolist() == [[0.0], [0.0], [0.0], [0.55], [0.9]]


def test_step_is_one_strictly_above_the_threshold():
    assert step(Z, THETA, EPS).tolist() == [[0.0], [0.0], [0.0], [1.0], [1.0]]


def test_jumprelu_gradient_to_z_is_the_ordinary_one():
    d_out = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    d_z, _ = gradients(jumprelu, Z, THETA, d_out)
    assert d_z.tolist() == [[0.0], [0.0], [0.0], [4.0], [5.0]]


def test_jumprelu_gradient_to_theta_counts_both_halves_of_the_window():
    d_out = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    _, d_theta = gradients(jumprelu, Z, THETA, d_out)
    # -(θ/ε)·(2 + 3 + 4) = -2.5·9; the upper half alone would give -10, -(z/ε)·K would give -23
    torch.testing.assert_close(d_theta, torch.tensor([-22.5], dtype=torch.float64))


def test_step_gradient_to_theta_counts_both_halves_and_none_goes_to_z():
    d_out = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64)
    d_z, d_theta = gradients(step, Z, THETA, d_out)
    assert d_z is None
    torch.testing.assert_close(d_theta, torch.tensor([-45.0], dtype=torch.float64))  # -(1/0.2)·9


def test_step_on_outputs_instead_of_pre_activations_loses_the_lower_half():
    ones = torch.ones_like(Z)
    f = jumprelu(Z, THETA, EPS)
    _, right = gradients(step, Z, THETA, ones)
    _, wrong = gradients(step, f, THETA, ones)
    assert right.item() == -15.0  # z = 0.45, 0.5, 0.55
    assert wrong.item() == -5.0  # z = 0.55 only


def test_the_window_is_open_at_both_edges():
    theta = torch.tensor([1.0], dtype=torch.float64)
    edges = torch.tensor([[0.75], [1.25]], dtype=torch.float64)  # exactly ±ε/2 in binary
    inside = torch.tensor([[0.7500001], [1.2499999]], dtype=torch.float64)
    for function in (jumprelu, step):
        assert gradients(function, edges, theta, torch.ones_like(edges), eps=0.5)[1].item() == 0.0
        assert gradients(function, inside, theta, torch.ones_like(edges), eps=0.5)[1].item() == -4.0  # 2·1/ε, θ = 1


def test_bandwidth_scales_the_theta_gradient_once():
    z, theta, one = (
        torch.tensor([[1.0]], dtype=torch.float64),
        torch.tensor([1.0], dtype=torch.float64),
        torch.ones(1, 1),
    )
    for eps in (0.1, 0.5, 2.0):
        assert gradients(step, z, theta, one.double(), eps=eps)[1].item() == -1 / eps


def test_log_theta_gets_the_chain_factor():
    log_theta = THETA.log().requires_grad_()
    step(Z, log_theta.exp(), EPS).sum().backward()
    torch.testing.assert_close(log_theta.grad, torch.tensor([-15.0 * 0.5], dtype=torch.float64))


def test_theta_gradient_is_summed_over_every_leading_dimension():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    theta = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    d_out = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    window = ((z - theta).abs() < 0.5).double()
    _, d_theta = gradients(jumprelu, z, theta, d_out, eps=1.0)
    torch.testing.assert_close(d_theta, -(theta * window * d_out).sum((0, 1)))
    _, d_theta = gradients(step, z, theta, d_out, eps=1.0)
    torch.testing.assert_close(d_theta, -(window * d_out).sum((0, 1)))


def test_step_gradient_estimates_the_derivative_of_the_expected_l0():
    """E[H(z - θ)] has the derivative -density(θ); for z uniform on [0, 1] that is -1 wherever θ is."""
    z = ((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000).unsqueeze(1)
    for eps in (0.01, 0.1):
        _, d_theta = gradients(step, z, THETA, torch.full_like(z, 1 / len(z)), eps=eps)
        torch.testing.assert_close(d_theta, torch.tensor([-1.0], dtype=torch.float64), atol=2e-3, rtol=0)
