"""BERT: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.

On the same weights these classes compute what the stock BERT classes compute. Without padding no mask is built. In
training, the masked-LM head runs on the masked positions only: its product with the vocabulary is the largest of the
model.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BertConfig
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as library
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .stock import Attention, StockConfigMixin, StockPreTrainedModel, make_document_mask, project, same_document


@strict
class MyBertConfig(StockConfigMixin, BertConfig):
    """[`BertConfig`], with the same fields, for the classes of this file."""

    def check_architecture(self):
        super().check_architecture()
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("is_decoder and add_cross_attention are for decoders; this family is an encoder")
        if self.type_vocab_size < 1:
            raise ValueError(f"type_vocab_size is {self.type_vocab_size}; it must be at least 1")


class MyBertEmbeddings(nn.Module):
    """Sum of the token, position and sentence (token type) embeddings."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds, token_type_ids, position_ids):
        embedded = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded))


class MyBertSelfAttention(Attention):
    """Bidirectional multi-head self-attention."""

    def __init__(self, config: MyBertConfig):
        head_dim, dropout = config.hidden_size // config.num_attention_heads, config.attention_probs_dropout_prob
        super().__init__(config, head_dim, head_dim**-0.5, dropout, is_causal=False)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        query, key, value = (
            self.split_heads(project(layer, hidden_states)) for layer in (self.query, self.key, self.value)
        )
        return self.attend(query, key, value, attention_mask, **kwargs)


class MyBertAttention(nn.Module):
    """Self-attention and the end of its residual branch; the module names are those of stock checkpoints."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.self = MyBertSelfAttention(config)
        self.output = library.BertSelfOutput(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        output, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(output, hidden_states)


class MyBertIntermediate(library.BertIntermediate):
    """First layer of the feed-forward network."""

    def forward(self, hidden_states):
        return self.intermediate_act_fn(project(self.dense, hidden_states))


class MyBertLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with a residual connection and post-normalization."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = MyBertAttention(config)
        self.intermediate = MyBertIntermediate(config)
        self.output = library.BertOutput(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended = self.attention(hidden_states, attention_mask, **kwargs)
        return apply_chunking_to_forward(self.feed_forward, self.chunk_size_feed_forward, 1, attended)

    def feed_forward(self, attended):
        return self.output(self.intermediate(attended), attended)


class MyBertEncoder(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([MyBertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


class MyBertPreTrainedModel(StockPreTrainedModel):
    """Base class of the BERT models."""

    config: MyBertConfig
    base_model_prefix = "bert"
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["MyBertEmbeddings", "MyBertLayer"]
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]  # 0, 1, 2 ... in the first BERT checkpoints
    _can_record_outputs = {"hidden_states": MyBertLayer, "attentions": MyBertSelfAttention}


class MyBertModel(MyBertPreTrainedModel):
    """BERT without a head: token ids in, hidden states out. On disk it is a stock BertModel."""

    def __init__(self, config: MyBertConfig, add_pooling_layer=True):
        super().__init__(config)
        self.embeddings = MyBertEmbeddings(config)
        self.encoder = MyBertEncoder(config)
        self.pooler = library.BertPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        document_ids=None,
        **kwargs,
    ):
        """Return the hidden states of the last layer, and the pooled first position of each row.

        Args:
            input_ids: (batch, length) token ids; or inputs_embeds (batch, length, hidden_size), not both.
            attention_mask: (batch, length), 1 for tokens and 0 for padding.
            token_type_ids: (batch, length), 0 for the first sentence and 1 for the second; default: 0.
            position_ids: (batch, length), 0 to max_position_embeddings - 1; default: 0, 1, 2 ...
            document_ids: (batch, length), equal within a document. Tokens attend within their document only.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        if token_type_ids is None:
            token_type_ids = torch.zeros(batch_size, length, dtype=torch.long, device=inputs_embeds.device)
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)

        mask = None
        if self.config._attn_implementation == "flex_attention" and attention_mask is None and document_ids is not None:
            mask = make_document_mask(document_ids)
        elif attention_mask is not None or document_ids is not None:
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                and_mask_function=None if document_ids is None else same_document(document_ids),
            )
        hidden_states = self.embeddings(inputs_embeds, token_type_ids, position_ids)
        hidden_states = self.encoder(hidden_states, mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states) if self.pooler is not None else None,
        )


class MyBertWithLMHead(MyBertPreTrainedModel):
    """Base class of the two models with a masked-LM head."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, library.BertLMPredictionHead):
            init.zeros_(module.bias)

    def tie_weights(self, *arguments, **options):
        super().tie_weights(*arguments, **options)
        # Untied, nothing reads it, as in the stock class; DDP would wait for its gradient.
        self.cls.predictions.bias.requires_grad_(self.config.tie_word_embeddings)

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value
        # Checkpoints of untied models hold both biases; one shared parameter would be saved under one name only.
        is_tied = self.config.tie_word_embeddings
        self.cls.predictions.bias = value.bias if is_tied else nn.Parameter(value.bias.detach().clone())

    def predict_masked(self, hidden_states, labels, masked_positions):
        """Return the logits and the labels of the positions that the loss needs.

        With `masked_positions` (batch, masked), these positions: their number is the same in every row, so that one
        compiled graph serves every batch. Without, the positions with a label in training, and all in evaluation.
        """
        if masked_positions is not None:
            index = masked_positions.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
            hidden_states = hidden_states.gather(1, index)
        elif self.training and labels is not None and not torch.compiler.is_compiling():
            labels = labels.view(hidden_states.shape[:2])  # the stock class takes flat labels too
            is_masked = labels != -100
            hidden_states, labels = hidden_states[is_masked], labels[is_masked]
        return self.cls.predictions(hidden_states), labels


class MyBertForPreTraining(MyBertWithLMHead):
    """BERT with its two pre-training heads. On disk it is a stock BertForPreTraining."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # cross-entropy of logits and labels, for both heads
        self.bert = MyBertModel(config)
        self.cls = library.BertPreTrainingHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        next_sentence_label=None,
        masked_positions=None,
        num_items_in_batch=None,
        num_pairs_in_batch=None,
        skip_logits=False,
        **kwargs,
    ):
        """Return the logits of both heads, and the sum of their mean cross-entropies in nats if both labels are given.

        Args:
            labels, masked_positions, num_items_in_batch: as in [`MyBertForMaskedLM`].
            next_sentence_label: (batch,), 0 where the second sentence follows the first, 1 where not, -100 ignored.
            num_pairs_in_batch: divide the summed next-sentence loss by this instead of by the number of labels here.
            skip_logits: return no logits of tokens, as in [`MyBertForMaskedLM`].
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits, labels = self.predict_masked(outputs.last_hidden_state, labels, masked_positions)
        pair_logits = self.cls.seq_relationship(outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch)
            pair_loss = self.loss_function(pair_logits, next_sentence_label, 2, num_pairs_in_batch)
            if num_items_in_batch is not None and num_pairs_in_batch is None:
                # The Trainer accumulates over micro-batches and counts labels only: scale the mean pair loss alike.
                pair_loss = pair_loss * (labels != -100).sum() / num_items_in_batch
            loss = loss + pair_loss
        return library.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=None if skip_logits else logits,
            seq_relationship_logits=pair_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MyBertForMaskedLM(MyBertWithLMHead):
    """BERT with a masked-LM head. On disk it is a stock BertForMaskedLM."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.cls = library.BertOnlyMLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        *,
        labels=None,
        masked_positions=None,
        num_items_in_batch=None,
        skip_logits=False,
        **kwargs,
    ):
        """Return logits over the vocabulary, and the mean cross-entropy in nats if labels are given.

        In training with labels, the head runs on the labeled positions only and the logits are (labels that are not
        ignored, vocab_size). Otherwise they are (batch, length, vocab_size), as in the stock class.

        Args:
            labels: (batch, length) token ids, -100 is ignored.
            masked_positions: (batch, masked) positions to run the head on, in training or not. Labels are then (batch,
                masked) and logits (batch, masked, vocab_size).
            num_items_in_batch: divide the summed loss by this instead of by the number of labels in this batch.
            skip_logits: return the loss only; returned logits are large and stay in memory.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits, labels = self.predict_masked(outputs.last_hidden_state, labels, masked_positions)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss,
            logits=None if skip_logits else logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MyBertClassifier(MyBertPreTrainedModel):
    """Base class of the two classifiers: dropout and a linear layer on the pooled row or on each token."""

    add_pooling_layer = False
    output_class = TokenClassifierOutput

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config, self.add_pooling_layer)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        """Return logits (batch, num_labels) or (batch, length, num_labels), and the loss if labels are given.

        Args:
            labels: for tokens, (batch, length) class ids, -100 is ignored. For rows, (batch,) class ids; (batch,
                num_labels) of 0.0 and 1.0 for independent classes; (batch,) numbers for regression (num_labels 1).
                `config.problem_type` selects the loss of rows; if unset, it follows from the labels.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        features = outputs.pooler_output if self.add_pooling_layer else outputs.last_hidden_state
        logits, loss = self.classifier(self.dropout(features)), None
        if labels is not None:  # the loss of rows takes pooled_logits, that of tokens takes logits
            loss = self.loss_function(logits=logits, pooled_logits=logits, labels=labels, config=self.config, **kwargs)
        return self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MyBertForSequenceClassification(MyBertClassifier):
    """BERT with a classifier of whole rows. On disk it is a stock BertForSequenceClassification."""

    add_pooling_layer = True
    output_class = SequenceClassifierOutput


class MyBertForTokenClassification(MyBertClassifier):
    """BERT with a classifier of each token. On disk it is a stock BertForTokenClassification."""


class MyBertForQuestionAnswering(MyBertPreTrainedModel):
    """BERT with a span head that finds answers in the text. On disk it is a stock BertForQuestionAnswering."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ):
        """Return logits (batch, length) of an answer's first and last token, and the mean of both cross-entropies.

        Args:
            start_positions, end_positions: (batch,) positions of the answer's first and last token; a position beyond
                the row is ignored.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
