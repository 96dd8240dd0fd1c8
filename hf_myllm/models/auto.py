"""Stock classes of transformers as model families: any model type that the package has no training class for.

The class that is trained is a subclass of the stock class with the same name. Its forward also takes what the tasks
pass to our own classes, and computes the loss of a training step from the stock class's logits. What is saved is what
the stock class saves.
"""

import functools
import inspect
import sys

import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ModelError
from .loss import IGNORE_INDEX
from .stock import StockConfigMixin, same_document

# Tasks -> the library's list of the classes that have their head.
_HEADS = {
    ("seq2seq", "span_corruption", "denoising"): modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ("mlm",): modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ("mlm_nsp",): modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    ("causal", "instruction"): modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ("classification",): modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ("token_classification",): modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ("question_answering",): modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")  # of models of more than text


class StockTraining:
    """Mix-in for a subclass of a stock class: the forward pass of a training step.

    The stock class's own forward runs unless `skip_logits` asks for a step of a [`~hf_myllm.tasks.base.Task`].
    """

    input_names = frozenset()  # of the stock class's forward
    balance_loss = None  # function of the stock class's module, for a mixture of experts

    def training_step(
        self,
        shift_labels=None,
        labels=None,
        masked_positions=None,
        next_sentence_label=None,
        num_items_in_batch=None,
        num_pairs_in_batch=None,
        **inputs,
    ):
        """Return the stock class's outputs with the loss: the sum over all targets divided by their global count.

        Args:
            shift_labels: (batch, length) token ids, -100 is ignored; position t predicts shift_labels t.
            labels: in place of shift_labels: (batch, length), or (batch, masked) at `masked_positions`. Without
                decoder_input_ids, a decoder reads these, shifted to the right.
            next_sentence_label: (batch,), as in BertForPreTraining.
            num_items_in_batch, num_pairs_in_batch: divide the sums by these.
            inputs: of the stock class; None and what it does not take is left out.
        """
        if self.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
            # Only the class knows the first token that a decoder reads. A row without labels only fills the batch.
            other = int(not self.config.pad_token_id)  # than the padding
            inputs["labels"] = labels.where((labels != IGNORE_INDEX).any(-1, keepdim=True), other)
        coefficient = self.router_coefficient if self.training and shift_labels is not None else 0
        if coefficient:
            inputs["output_router_logits"] = True
        outputs = self.stock_forward(**inputs)
        logits = outputs["prediction_logits" if "prediction_logits" in outputs else "logits"]
        if masked_positions is not None:
            logits = logits.gather(1, masked_positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        targets = labels if shift_labels is None else shift_labels
        loss = _mean_cross_entropy(logits, targets, num_items_in_batch)
        if next_sentence_label is not None:
            loss = loss + _mean_cross_entropy(outputs.seq_relationship_logits, next_sentence_label, num_pairs_in_batch)
        if coefficient:
            loss = loss + coefficient * self.router_loss(outputs.router_logits, targets, num_items_in_batch)
        return type(outputs)(loss=loss)

    def stock_forward(self, document_ids=None, **inputs):
        """Return the outputs of the stock class for those of the inputs that are not None and that it takes.

        Args:
            document_ids: (batch, length), equal within a document of an encoder, whose tokens attend within it only.
        """
        names = self.input_names
        if document_ids is not None:
            inputs["attention_mask"] = _document_mask(self.config, document_ids, self.dtype)
            inputs["position_ids"] = inputs["position_ids"] + position_offset(
                type(self.config), self.config.pad_token_id
            )
        known = {name: value for name, value in inputs.items() if value is not None and name in names}
        if "return_dict" in names:
            known["return_dict"] = True
        return super().forward(**known)

    @property
    def router_coefficient(self):
        """The weight of the balance loss of a mixture of experts; 0 if the class has none."""
        if self.balance_loss is None:
            return 0
        return getattr(self, "router_aux_loss_coef", getattr(self, "aux_loss_coef", 0))

    def router_loss(self, router_logits, targets, count=None):
        """Return the balance loss of the class (Fedus et al. 2022) of each row, averaged over the rows' targets.

        The library computes it once over a micro-batch, whose expert counts do not add up over micro-batches and ranks.
        By row it does, as in DeepSeek-V3's sequence-wise loss. Padding after the last target of a row does not count.

        Args:
            router_logits: of each layer, (batch * length, experts).
            targets: (batch, length), -100 is ignored.
            count: number of targets by which the rows' shares are divided; default: in these rows.
        """
        has_target = targets != IGNORE_INDEX
        positions = torch.arange(targets.shape[1], device=targets.device)
        ends = (has_target * (positions + 1)).amax(-1, keepdim=True)
        masks, weights = (positions < ends).long(), has_target.sum(-1)
        layers = [layer.view(*targets.shape, -1) for layer in router_logits]
        losses = []
        for row, mask in enumerate(masks):
            logits = tuple(layer[row] for layer in layers)
            mask = torch.where(mask.any(), mask, 1)  # a row that fills the batch has no target: its weight is 0
            losses.append(self.balance_loss(logits, layers[0].shape[-1], self.num_experts_per_tok, mask[None]))
        return (torch.stack(losses) * weights).sum() / (weights.sum() if count is None else count)


def _mean_cross_entropy(logits, targets, count):
    loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")
    return loss / ((targets != IGNORE_INDEX).sum() if count is None else count)


def _document_mask(config, document_ids, dtype):
    """Return the mask of an encoder for rows of several documents, or a dict of masks by layer type."""
    embeddings = torch.empty(*document_ids.shape, 0, dtype=dtype, device=document_ids.device)
    arguments = {"config": config, "inputs_embeds": embeddings, "attention_mask": None}
    arguments["and_mask_function"] = same_document(document_ids)
    mask = create_bidirectional_mask(**arguments)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    return {"full_attention": mask, "sliding_attention": create_bidirectional_sliding_window_mask(**arguments)}


def _input_names(model_class):
    """Return the names of the arguments of a class's forward; with **kwargs, also of those that every class takes."""
    parameters = inspect.signature(model_class.forward).parameters.values()
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return frozenset(p.name for p in parameters) | ({"output_router_logits"} if takes_more else set())


@functools.cache
def training_class(stock_class):
    """Return the subclass of a stock class that is trained, under the same name."""

    @functools.wraps(stock_class.forward)  # `generate` reads the signature
    def forward(self, *arguments, skip_logits=False, **inputs):
        if skip_logits:
            return self.training_step(**inputs)
        return stock_class.forward(self, *arguments, **inputs)

    # Kept here: FSDP2 makes a class of another module of this one.
    balance_loss = getattr(sys.modules[stock_class.__module__], "load_balancing_loss_func", None)
    members = {"forward": forward, "input_names": _input_names(stock_class)}
    members |= {"balance_loss": staticmethod(balance_loss)} if balance_loss else {}
    members |= {name: getattr(stock_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock_class.__name__, (StockTraining, stock_class), members)


def known_types():
    """Return the model types that have a task."""
    return sorted({name for tasks, names in _HEADS.items() for name in names if tasks != ("mlm_nsp",)})


def find_classes(model_type):
    """Return the configuration class of a model type and its training classes by task.

    Raises:
        KeyError: the library has no such model type.
        ModelError: it is no model of text, or one of several parts.
    """
    config_class = CONFIG_MAPPING[model_type]
    parts = [name for name in config_class.sub_configs if name in _PARTS]
    if parts:
        text = config_class.sub_configs.get("text_config")
        hint = f"; its text model is {text.model_type}" if getattr(text, "model_type", None) in known_types() else ""
        raise ModelError(
            f"model {model_type} consists of {' and '.join(parts)}, and only text models can be trained{hint}"
        )
    tasks = {}
    for names, classes in _HEADS.items():
        name = classes.get(model_type)
        name = name[0] if isinstance(name, tuple) else name
        # In the library, encoder-decoders also have heads of encoders and of decoders, and encoders those of decoders,
        # with which they see the tokens that they should predict.
        if name is None or "seq2seq" in tasks or (tasks and "causal" in names):
            continue
        stock_class = getattr(transformers, name)
        if names == ("mlm_nsp",) and "next_sentence_label" not in _input_names(stock_class):
            continue
        tasks |= dict.fromkeys(names, training_class(stock_class))
    if not tasks:
        raise ModelError(f"model {model_type} is no text model with a head for any task; see docs/models.md")
    return config_class, tasks


def num_positions(config):
    """Return how many tokens the rows of a model can have; None if its architecture has no limit."""
    positions = max(0, getattr(config, "max_position_embeddings", None) or 0)  # XLNet has -1
    return positions - position_offset(type(config), getattr(config, "pad_token_id", None)) if positions else None


@functools.cache
def position_offset(config_class, pad_token_id):
    """Return how many of the position embeddings no token has: RoBERTa counts from pad_token_id + 1."""
    has_embeddings = not ({"rope_parameters", "rope_theta"} & set(config_class.__dataclass_fields__))
    if issubclass(config_class, StockConfigMixin) or pad_token_id is None or not has_embeddings:
        return 0
    with torch.device("meta"):
        model = AutoModel.from_config(config_class(pad_token_id=pad_token_id))
    modules = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    return max([0, *(module.padding_idx + 1 for module in modules if getattr(module, "padding_idx", None) is not None)])
