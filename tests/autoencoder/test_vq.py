"""The codebook knows planted codes, learns clusters, revives dead codes, and is the same over processes and batches."""

import pytest
import torch
from tiny import peak_bytes

from autoencoder import VQGAN3D, Codebook, code_statistics, commitment_loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(**changes) -> VQGAN3D:
    torch.manual_seed(0)
    arguments = {"channels": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1), "num_codes": 16}
    return VQGAN3D(**(arguments | changes))


def test_planted_codes_return_their_indices():
    book = Codebook(32, 4)
    book.codes.copy_(torch.randn(32, 4, generator=seeded()))
    indices = torch.randint(0, 32, (2, 3, 4, 5), generator=seeded(1))
    near = book.codes[indices].movedim(-1, 1) + 1e-3 * torch.randn(2, 4, 3, 4, 5, generator=seeded(2))
    quantized, found = book(near)
    assert torch.equal(found, indices)
    assert torch.allclose(quantized, book.codes[indices].movedim(-1, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_decoded_is_a_code_however_far_the_latents(dtype):
    book, latents = Codebook(8, 4), torch.randn(1, 4, 2, 2, 2, generator=seeded()) * 1000
    quantized, found = book(latents.to(dtype))
    assert torch.equal(quantized, book.codes[found].movedim(-1, 1).to(dtype))


def test_nearest_is_nearest_whatever_the_parts(monkeypatch):
    book, cells = Codebook(50, 3), torch.randn(77, 3, generator=seeded())
    expected = torch.cdist(cells.double(), book.codes.double()).argmin(1)
    assert torch.equal(book.nearest(cells), expected)
    monkeypatch.setattr("autoencoder.codebook.DISTANCE_BYTES", 1)
    assert torch.equal(book.nearest(cells), expected)


def test_gradients_pass_straight_through_and_leave_the_codebook():
    book, latents = Codebook(8, 4), torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    weights = torch.randn(1, 4, 2, 2, 2)
    (book(latents)[0] * weights).sum().backward()
    assert torch.equal(latents.grad, weights)
    assert not any(p.requires_grad for p in book.parameters()) and not list(book.parameters())


def test_updates_find_the_clusters():
    centers = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    book, generator = Codebook(4, 2, decay=0.8), seeded()
    for step in range(60):
        noise = 0.1 * torch.randn(200, 2, generator=seeded(step))
        book.update(centers[torch.arange(200) % 4] + noise, generator)
    order = torch.cdist(centers, book.codes).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert torch.allclose(book.codes[order], centers, atol=0.1)


def test_moving_average_is_that_of_the_paper():
    """N = g N + (1 - g) n, m = g m + (1 - g) sum z, e = m / N (van den Oord et al. 2017, Eqs. 6-8)."""
    book = Codebook(2, 1, decay=0.9)
    book.codes.copy_(torch.tensor([[0.0], [10.0]]))
    book.counts.copy_(torch.tensor([2.0, 4.0]))
    book.sums.copy_(torch.tensor([[0.0], [40.0]]))
    book.initialized.fill_(True)
    book.update(torch.tensor([[1.0], [2.0], [9.0]]), seeded())
    assert torch.allclose(book.counts, torch.tensor([0.9 * 2 + 0.1 * 2, 0.9 * 4 + 0.1 * 1]))
    assert torch.allclose(book.codes[:, 0], torch.tensor([0.1 * 3 / 2.0, (0.9 * 40 + 0.1 * 9) / 3.7]))


def test_a_dead_code_restarts_at_a_cell():
    book = Codebook(3, 2, decay=0.5, dead_below=0.2)
    book.codes.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [100.0, 100.0]]))
    book.counts.fill_(0.3)
    book.sums.copy_(book.codes * 0.3)
    book.initialized.fill_(True)
    cells = torch.rand(20, 2, generator=seeded())
    book.update(cells, seeded())
    assert (cells == book.codes[2]).all(1).any()
    assert book.counts[2] == 1
    assert not (cells == book.codes[0]).all(1).any()  # alive: it averaged


def test_two_processes_make_the_codebook_of_one():
    cells = torch.randn(40, 3, generator=seeded())
    books = [Codebook(6, 3) for _ in range(3)]
    for book in books[1:]:
        book.load_state_dict(books[0].state_dict())
    books[0].update(cells, seeded(1))
    for book, own in zip(books[1:], cells.chunk(2), strict=True):
        book.update(own, seeded(1), gather=lambda _: cells)
    for book in books[1:]:
        assert all(torch.equal(book.state_dict()[k], v) for k, v in books[0].state_dict().items())


def test_initialization_happens_once_and_is_part_of_the_state():
    book = Codebook(4, 2)
    book.update(torch.randn(10, 2, generator=seeded()), seeded())
    resumed = Codebook(4, 2)
    resumed.load_state_dict(book.state_dict())
    assert resumed.initialized
    for b in (book, resumed):
        b.update(torch.randn(10, 2, generator=seeded(1)), seeded(2))
    assert torch.equal(book.codes, resumed.codes)


def test_more_codes_than_cells_gives_distinct_codes():
    book = Codebook(64, 2)
    book.update(torch.randn(10, 2, generator=seeded()), seeded())
    assert len(torch.unique(book.codes, dim=0)) > 50


def test_float32_under_autocast():
    book, latents = Codebook(512, 4), torch.randn(1, 4, 4, 4, 4)
    expected = book(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = book(latents)
    assert torch.equal(found[1], expected[1])


def test_the_search_holds_a_part_of_the_distances():
    """8,192 cells against 16,384 codes: all distances at once would be 512 MiB."""
    book, cells = Codebook(16_384, 8), torch.randn(8192, 8)
    assert peak_bytes(lambda: book.nearest(cells)) < 1 << 28


def test_statistics_of_known_histograms():
    even = code_statistics(torch.arange(8).repeat(3), 16)
    assert {k: v.item() for k, v in even.items()} == pytest.approx({"perplexity": 8, "usage": 0.5, "bits_per_cell": 3})
    one = code_statistics(torch.zeros(5, dtype=torch.long), 4)
    assert {k: v.item() for k, v in one.items()} == pytest.approx({"perplexity": 1, "usage": 0.25, "bits_per_cell": 0})


@torch.no_grad()
def test_latents_are_not_quantized_until_decoding():
    vae = tiny().eval()
    vae.set_latent_statistics([0.5] * 8, [2.0] * 8)
    volume = torch.randn(1, 1, 8, 8, 8)
    posterior = vae.encode(volume).latent_dist
    assert torch.allclose(posterior.mode() * 2 + 0.5, posterior.raw_mean, atol=1e-6)
    assert torch.equal(posterior.sample(seeded()), posterior.mode())
    codes = vae.codebook.codes[posterior.indices].movedim(-1, 1)
    from_codes = vae.decode((codes - 0.5) / 2).sample
    assert torch.allclose(vae.decode(posterior.mode()).sample, from_codes, atol=1e-4)


def test_commitment_counts_cells_inside_only():
    vae, fov = tiny(), torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    fov[..., :4] = True  # the first of two latent cells along Z
    posterior = vae.encode(torch.randn(1, 1, 8, 8, 8)).latent_dist
    codes = vae.codebook.codes[posterior.indices].movedim(-1, 1)
    expected = ((posterior.raw_mean - codes)[..., :1] ** 2).mean()
    assert torch.allclose(commitment_loss(posterior, fov), expected)


def test_save_and_load_keep_the_codebook(tmp_path):
    vae = tiny()
    vae.codebook.update(torch.randn(50, 8, generator=seeded()), seeded())
    vae.save_pretrained(tmp_path)
    loaded = VQGAN3D.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in vae.state_dict().items())
    half = VQGAN3D.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.codebook.codes.dtype == torch.float32 and half.encoder[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"num_codes": 1}, {"codebook_decay": 1.0}])
def test_impossible_codebooks_are_named(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: got 1"):
        tiny(**changes)
