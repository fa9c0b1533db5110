"""Positions to tokens: the order of blocks and values, and principal components that come back."""

from __future__ import annotations

import pytest
import torch

from dreamer.models.cosmos_spatial import BlockPCA, choose_token_grid, fold, mean_tokens, unfold


@pytest.mark.parametrize(
    ("positions", "tokens", "grid"),
    [((32, 32), 16, (4, 4)), ((8, 8), 16, (4, 4)), ((8, 16), 8, (2, 4)), ((8, 12), 6, (2, 3)), ((4, 4), 8, (2, 4)), ((1, 5), 5, (1, 5))],
)
def test_token_grid_with_nearly_square_blocks(positions: tuple[int, int], tokens: int, grid: tuple[int, int]) -> None:
    assert choose_token_grid(positions, tokens) == grid


def test_tokens_that_do_not_divide_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="8x8 latent positions do not divide into 3"):
        choose_token_grid((8, 8), 3)


def test_blocks_by_hand() -> None:
    latents = torch.randn(2, 3, 2, 4, 6)
    tokens = fold(latents, (2, 3))
    assert tokens.shape == (2, 2, 6, 12)
    block = latents[1, :, 1, 2:4, 2:4]  # row 1, column 1 of the grid: token 4
    assert torch.equal(tokens[1, 1, 4], block.flatten())
    torch.testing.assert_close(mean_tokens(latents, (2, 3))[1, 1, 4], block.mean((1, 2)))
    assert torch.equal(unfold(tokens, (2, 3), (2, 2)), latents)
    assert torch.equal(fold(latents, (4, 6))[0, 0, 7], latents[0, :, 0, 1, 1])


def test_components_have_unit_variance_and_come_back() -> None:
    mixing = torch.randn(3, 12) * torch.tensor([[9.0], [3.0], [1.0]])
    values = (torch.randn(2, 5, 40, 3) @ mixing) + 2  # three dimensions in twelve
    pca = BlockPCA(12, 3)
    pca.fit(values.flatten(0, 2))
    tokens = pca(values)
    torch.testing.assert_close(tokens.flatten(0, 2).mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.flatten(0, 2).T.cov(), torch.eye(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(pca.inverse(tokens), values, atol=1e-3, rtol=1e-3)
    assert pca.std.tolist() == sorted(pca.std.tolist(), reverse=True)


def test_all_components_lose_nothing_and_signs_are_fixed() -> None:
    values = torch.randn(1, 1, 50, 6)
    first, second = BlockPCA(6, 6), BlockPCA(6, 6)
    first.fit(values[0, 0])
    second.fit(values[0, 0].flip(0))
    torch.testing.assert_close(first.inverse(first(values)), values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first.basis, second.basis, atol=1e-4, rtol=1e-3)


def test_errors_of_the_projection() -> None:
    with pytest.raises(ValueError, match="latent_dim is 7; the blocks of positions hold only 6"):
        BlockPCA(6, 7)
    pca = BlockPCA(6, 4)
    for use in (pca, pca.inverse):
        with pytest.raises(ValueError, match=r"not fitted yet; call fit_projection\(latents\)"):
            use(torch.zeros(1, 1, 1, 6 if use is pca else 4))
    with pytest.raises(ValueError, match="needs more than 4 blocks; got 4"):
        pca.fit(torch.randn(4, 6))
    with pytest.raises(ValueError, match="NaN or infinity"):
        pca.fit(torch.full((9, 6), torch.nan))
