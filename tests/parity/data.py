"""Global batches, by name. Each is a function of the model that gives forward's keyword arguments."""

import torch

from tedfx.verification.batches import make_batch


def uneven_labels(model):
    """8 rows of 12. The first half of the rows keeps about 70% of its labels, the second half a single
    one."""
    return make_batch(model, 8, 12, 0)


def longer(model):
    """Another batch size and sequence length."""
    return make_batch(model, 4, 17, 3)


def no_labels_in_second_half(model):
    """Over two or more batch ranks, the last one has no valid label at all."""
    batch = make_batch(model, 8, 12, 0)
    batch["labels"][4:] = -100
    return batch


def one_token(model):
    """Every position holds the same token: all go to the same top-k experts, all others have none, and on ep
    a rank may have no rows."""
    batch = make_batch(model, 8, 12, 0)
    batch["input_ids"] = torch.full_like(batch["input_ids"], 63)
    return batch


def one_token_in_second_half(model):
    """The second half of the rows, a rank's whole share over two batch ranks, holds one token; the first is
    random."""
    batch = make_batch(model, 8, 12, 0)
    batch["input_ids"][4:] = 63
    batch["labels"][4:] = torch.where(torch.arange(12) % 3 == 0, 5, -100)
    return batch


def counted(model):
    """With the number of labels to divide by: the global count, as a trainer that accumulates passes it."""
    batch = make_batch(model, 8, 12, 0)
    return {**batch, "num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}


def odd(model):
    """11 positions: no number of tensor ranks divides them."""
    return make_batch(model, 8, 11, 2)


def shorter_than_ranks(model):
    """Two positions: over four tensor ranks, two have no token at all."""
    return make_batch(model, 8, 2, 4)


def all_labels(model):
    """Every position counts: what becomes of any rank's tokens shows in the loss."""
    batch = make_batch(model, 8, 12, 0)
    return {**batch, "labels": batch["input_ids"].clone()}
