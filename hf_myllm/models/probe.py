"""Prove on a stock class what the package relies on, before anything is written: a few forward passes of short rows.

Our own classes are tested for it. A stock class may see later tokens or other documents of a row, or its loss may not
be the cross-entropy of its logits; a run would then learn something else than its recipe says.
"""

import copy

import torch

from ..errors import ModelError, first_line
from .auto import StockTraining, num_positions
from .initialization import InitialWeights, make_on_meta
from .loss import IGNORE_INDEX

_LENGTH, _TAIL = 16, 4  # tokens of a row, and how many of them are changed or padded
_NEXT_TOKEN_TASKS = ("causal", "instruction")
_ENCODER_DECODER_TASKS = ("seq2seq", "span_corruption", "denoising")


def check_class(model, task, packing, isolates_documents=False, pads_rows=False):
    """Check that a stock class does in training what a task expects of it; our own classes are not checked.

    Args:
        isolates_documents: whether the documents of a row must not see each other.
        pads_rows: whether rows are padded on the right.
    Raises:
        ModelError: it does not.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, StockTraining):
        return
    settings = task, packing, isolates_documents, pads_rows
    if next(model.parameters()).is_meta:  # what a few layers do not show is asked of all
        problem = _find_error(_few_layers, model, *settings) and _find_error(_all_layers, model, *settings)
    else:
        problem = _find_error(lambda model: model, model, *settings)
    if problem:
        raise ModelError(f"model {model.config.model_type}, {type(model).__name__}: {problem}")


def _find_error(make, model, *settings):
    """Return why the model that `make` returns for a model cannot be trained, or None."""
    try:
        model = make(model)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return _find_problem(model, *settings)
        finally:
            model.train(was_training)
    except Exception as error:  # of a class that does not check its configuration
        return f"it fails on a row of tokens ({type(error).__name__}: {first_line(error)[:200]}); change config"


def _all_layers(model):
    """Return a new model with its weights in memory, of a model on the meta device."""
    return InitialWeights(make_on_meta(type(model), model.config), 0).materialize()


def _few_layers(model):
    """Return a new model with as few layers as show all their types, of a model on the meta device."""
    config = copy.deepcopy(model.config)
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    config.num_hidden_layers = min(len(types), max(2, 1 + max(types.index(kind) for kind in types)))
    if getattr(config, "layer_types", None):
        config.layer_types = types[: config.num_hidden_layers]
    return InitialWeights(make_on_meta(type(model), config), 0).materialize()


def _find_problem(model, task, packing, isolates_documents, pads_rows):
    """Return why a model cannot be trained, or None."""
    probe, is_decoder = _Probe(model), task in _NEXT_TOKEN_TASKS
    probe.logits(probe.ids)  # it must not fail
    if task in (*_NEXT_TOKEN_TASKS, *_ENCODER_DECODER_TASKS) and probe.sees_later_tokens():
        hint = "; set is_decoder: true in config" if hasattr(model.config, "is_decoder") else ""
        return f"its tokens see later ones, which task {task} predicts{hint}"
    if model.config.is_encoder_decoder and model.router_coefficient:
        return "the balance losses of its experts cannot be computed here; set router_aux_loss_coef: 0 in config"
    is_language_task = task in ("mlm", *_NEXT_TOKEN_TASKS, *_ENCODER_DECODER_TASKS)
    if is_language_task and (losses := probe.compare_losses(is_decoder)):
        own, ours = losses
        return f"its loss of a row is {own:.6g}, and the cross-entropy of its logits {ours:.6g}; train another model"
    if isolates_documents and not probe.isolates_documents(is_decoder):
        others = "pad" if task == "instruction" else "stream or pad"
        return f"it does not keep the documents of a row apart, as packing {packing} needs it; use {others}"
    if pads_rows and not is_decoder and probe.sees_padding():
        remedy = "use packing stream" if task == "mlm" else f"train another model for task {task}"
        return f"its outputs depend on the padding of a row; {remedy}"
    return None


class _Probe:
    """Two short rows of tokens, and what a model in eval mode computes of them."""

    def __init__(self, model):
        config, self.model = model.config, model
        special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
        ordinary = [token for token in range(min(config.vocab_size, 200)) if token not in special]
        length = min(_LENGTH, num_positions(config) or _LENGTH)
        ids = torch.tensor([ordinary[(7 * index) % len(ordinary)] for index in range(4 * length)])
        self.ids, self.others = ids.view(2, 2, length)
        self.epsilon = torch.finfo(model.dtype).eps

    def logits(self, ids, model=None, **inputs):
        """Return the first tensor that a model computes of some rows."""
        if self.model.config.is_encoder_decoder:
            inputs = {"decoder_input_ids": self.others} | inputs
        outputs = (model or self.model).stock_forward(input_ids=ids, use_cache=False, **inputs)
        return next(tensor for tensor in outputs.to_tuple() if isinstance(tensor, torch.Tensor)).float()

    def differ(self, some, others, roundings=16):
        """Return whether two tensors differ by more than rounding."""
        return bool((some - others).abs().max() > roundings * self.epsilon * some.abs().max().clamp(min=1e-6))

    def sees_later_tokens(self):
        changed = torch.cat([self.ids[:, :-_TAIL], self.others[:, -_TAIL:]], dim=1)
        if self.model.config.is_encoder_decoder:
            logits = [self.logits(self.ids, decoder_input_ids=ids) for ids in (self.ids, changed)]
        else:
            logits = [self.logits(ids) for ids in (self.ids, changed)]
        return self.differ(*(values[:, :-_TAIL] for values in logits))

    def compare_losses(self, shifts):
        """Return the class's own loss of a row and the one that a training step computes, if they differ.

        Args:
            shifts: whether each position predicts the next token.
        """
        row, model, weight = self.ids[:1], self.model, self.model.router_coefficient
        labels = row[:, :-_TAIL] if model.config.is_encoder_decoder else row
        inputs = {"input_ids": row, "use_cache": False} | ({"output_router_logits": True} if weight else {})
        outputs = model.stock_forward(labels=labels, **inputs)
        padding = torch.full((1, 1), IGNORE_INDEX)
        targets = {"shift_labels": torch.cat([row[:, 1:], padding], dim=1)} if shifts else {"labels": labels}
        loss = model.training_step(**inputs, **targets).loss
        if weight:
            loss = loss + weight * model.router_loss(outputs.router_logits, row)
        return (outputs.loss.item(), loss.item()) if self.differ(outputs.loss, loss, 256) else None

    def isolates_documents(self, is_decoder):
        """Return whether a change of a row's first document leaves the second as it is, and as it is alone in a row."""
        try:
            return self._isolates_documents(is_decoder)
        except Exception:  # of a class that does not take the positions or the mask of several documents
            return False

    def _isolates_documents(self, is_decoder):
        half = self.ids.shape[1] // 2
        starts = torch.arange(self.ids.shape[1]) % half == 0
        positions = (torch.arange(self.ids.shape[1]) % half).expand_as(self.ids)
        packed = {"position_ids": positions}  # of which a decoder sees where documents begin
        if not is_decoder:
            packed["document_ids"] = starts.cumsum(0).expand_as(self.ids)
        changed = torch.cat([self.others[:, :half], self.ids[:, half:]], dim=1)
        changed[:, half - 1] = self.ids[:, half - 1]
        model = self.model
        before, after = (self.logits(ids, model, **packed) for ids in (self.ids, changed))
        if not self.differ(before[:, half - 1], after[:, half - 1], 64):
            # Layers that are initialized to zero hide what a token sees: look at a copy with other weights.
            model = copy.deepcopy(model)
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.cos(torch.arange(parameter.numel())).view_as(parameter))
            before, after = (self.logits(ids, model, **packed) for ids in (self.ids, changed))
        alone = self.logits(self.ids[:, half:], model)
        is_seen = self.differ(before[:, half - 1], after[:, half - 1], 64)
        is_isolated = not self.differ(before[:, half:], after[:, half:])
        return is_seen and is_isolated and not self.differ(before[:, half:], alone, 64)

    def sees_padding(self):
        length, pad = self.ids.shape[1] - _TAIL, self.model.config.pad_token_id or 0
        padded, mask = self.ids.clone(), torch.ones_like(self.ids)
        padded[:, length:], mask[:, length:] = pad, 0
        short = self.logits(self.ids[:, :length], attention_mask=mask[:, :length])
        return self.differ(short, self.logits(padded, attention_mask=mask)[:, : short.shape[1]], 64)
