"""The loss of a batch, over the tokens of the answers only; the same for padded batches and prompt trees.

    batch_loss(model, tensors(batch, model.config, "cpu")) -> 0.7050, differentiable

Logits of prompt tokens are never computed. With a vocabulary of 49,152, they would take most of the memory that the
training of a small model needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sg_local.finetune.batches import Batch, TrainRow, padded_batch, tree_batch, within_window

# Relative differences between tree and padded batch that rounding explains: measured 3e-6 in float32. They are about 1
# if the mask is ignored.
MAX_DIFFERENCE_FLOAT32 = 1e-3
MAX_DIFFERENCE_16_BIT = 5e-2
# Gradients below 6e-8 are zero in float16; the training scales its loss for that (torch.amp.GradScaler).
FLOAT16_LOSS_SCALE = 4096.0


@dataclass(frozen=True)
class TreeCheck:
    """A batch computed as a tree and padded, with the relative differences."""

    loss: float
    loss_difference: float
    gradient_difference: float  # norm of the difference over the norm
    bound: float

    @property
    def is_equal(self) -> bool:
        return self.loss_difference <= self.bound and self.gradient_difference <= self.bound


def tensors(batch: Batch, config: Any) -> dict[str, Any]:
    """The batch as torch tensors, with the attention masks that a model of this configuration takes."""
    import torch

    inputs: dict[str, Any] = {
        name: torch.from_numpy(getattr(batch, name))
        for name in ("input_ids", "position_ids", "sources", "targets", "weights")
    }
    if batch.visible is None:  # a padded batch needs no mask: the padding comes last and is never read
        return inputs
    full = torch.from_numpy(batch.visible)[None, None]
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or []
    if window is None or (layer_types and "sliding_attention" not in layer_types):
        return inputs | {"attention_mask": full}
    near = torch.from_numpy(within_window(batch, window))[None, None]
    by_type = {"full_attention": full, "sliding_attention": near}
    return inputs | {"attention_mask": by_type if layer_types else near}


def batch_loss(model: Any, inputs: dict[str, Any]) -> Any:
    """Weighted mean of the negative log-likelihood in nats, a scalar tensor; model is a PeftModel."""
    import torch

    causal = model.get_base_model()
    decoder = getattr(causal, causal.base_model_prefix)
    mask = inputs.get("attention_mask")
    is_eager = causal.config._attn_implementation == "eager"
    is_unsloth = _is_unsloths(decoder)
    if is_unsloth:
        # Without these two, Unsloth's forward (on GPUs) cuts a batch at the model's context and ignores masks in
        # training.
        decoder._unsloth_allow_packed_overlength = True
        decoder._unsloth_keep_padding_mask = True
        if isinstance(mask, dict):  # it takes one; see is_beyond_one_mask
            mask = mask["full_attention"]
    # Its masks are added to the scores, and so are those of attention without a kernel.
    if isinstance(mask, torch.Tensor) and (is_unsloth or is_eager):
        mask = _added(mask)
    elif is_eager and isinstance(mask, dict):
        mask = {kind: _added(of_kind) for kind, of_kind in mask.items()}
    hidden = decoder(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    read = hidden.flatten(0, 1)[inputs["sources"]]
    logits = head_logits(causal, read).float()
    nll = torch.nn.functional.cross_entropy(logits, inputs["targets"], reduction="none")
    return (nll * inputs["weights"]).sum() / inputs["weights"].sum()


def _is_unsloths(decoder: Any) -> bool:
    """Whether the forward pass is Unsloth's own, as on GPUs."""
    module: str = type(decoder).forward.__module__
    return module.startswith("unsloth.")


def is_beyond_one_mask(model: Any, longest: int) -> bool:
    """Whether layers with a window see less than others of a row of so many tokens, but all get the same mask."""
    causal = model.get_base_model()
    window = getattr(causal.config, "sliding_window", None)
    has_kinds = bool(getattr(causal.config, "layer_types", None))
    return bool(
        has_kinds and window and longest > window and _is_unsloths(getattr(causal, causal.base_model_prefix))
    )


def _added(visible: Any) -> Any:
    """A mask that is added to attention scores: 0 is visible."""
    import torch

    lowest = torch.finfo(torch.float32).min
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, lowest)


def head_logits(causal: Any, hidden: Any) -> Any:
    """What the model's own forward pass makes of its last hidden states (..., hidden): logits (..., n_vocab)."""
    logits = causal.get_output_embeddings()(hidden)
    logits = logits / getattr(causal.config, "logits_scaling", 1.0)  # Granite's
    cap = getattr(causal.config, "final_logit_softcapping", None)  # Gemma 2's
    return logits if cap is None else cap * (logits / cap).tanh()


def check_tree(model: Any, rows: Sequence[TrainRow], to_loss: Any, loss_scale: float = 1.0) -> TreeCheck:
    """Loss and gradient of the rows as a tree, compared with those of each row alone (less memory than padding).

    to_loss: Batch -> loss, as the trainer computes it. loss_scale: for the backward pass, of which the differences,
    being relative, do not depend. Afterwards the model has no gradients.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_and_gradient(batches: list[Batch]) -> tuple[float, Any]:
        model.zero_grad(set_to_none=True)
        total = sum(float(batch.weights.sum()) for batch in batches)
        sum_of_losses = 0.0
        for batch in batches:
            loss = to_loss(batch) * (float(batch.weights.sum()) / total)
            (loss * loss_scale).backward()
            sum_of_losses += float(loss.detach())
        gradient = torch.cat([p.grad.float().flatten() for p in parameters if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return sum_of_losses, gradient

    loss, gradient = loss_and_gradient([padded_batch([row]) for row in rows])
    tree_loss, tree_gradient = loss_and_gradient([tree_batch(rows)])
    is_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return TreeCheck(
        loss=loss,
        loss_difference=abs(tree_loss - loss) / abs(loss),
        gradient_difference=float((tree_gradient - gradient).norm() / gradient.norm()),
        bound=MAX_DIFFERENCE_FLOAT32 if is_float32 else MAX_DIFFERENCE_16_BIT,
    )
