"""The BERT models with a head.

In training, the masked-LM head runs on the masked positions only: its product with the vocabulary is the largest of the
model. Otherwise these classes compute what the stock classes compute.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import (
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import (
    BertForPreTrainingOutput,
    BertLMPredictionHead,
    BertOnlyMLMHead,
    BertPreTrainingHeads,
)
from transformers.utils import can_return_tuple

from .bert import MyBertConfig, MyBertModel, MyBertPreTrainedModel


class MyBertWithLMHead(MyBertPreTrainedModel):
    """Base class of the two models with a masked-LM head."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, BertLMPredictionHead):
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
        self.cls = BertPreTrainingHeads(config)
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
        return BertForPreTrainingOutput(
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
        self.cls = BertOnlyMLMHead(config)
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
