"""BERT, written for training.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019. On the same
weights these classes compute what transformers' BERT classes compute, and they read and write the same files. Two
things differ inside: without padding no mask is built, and in training the masked-LM head, whose product with the
vocabulary is the largest of the model, runs on the masked positions only.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bert import MyBertConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain operations, for those who want to see the weights.

    Shapes: query, key, value (batch, heads, length, head size); returns (batch, length, heads, head size) and the
    weights (batch, heads, query length, key length).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class MyBertEmbeddings(nn.Module):
    """The sum of what a token is, where it stands, and which of two sentences it belongs to."""

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


class MyBertSelfAttention(nn.Module):
    """Multi-head attention of every position to every other."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by the attention functions when there is no mask
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(heads).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return mixed.reshape(hidden_states.shape), weights


class MyBertResidual(nn.Module):
    """The end of a residual branch: project, add what went around it, normalise."""

    def __init__(self, config: MyBertConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class MyBertAttention(nn.Module):
    """Self-attention and the end of its branch; the names are those of the files."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.self = MyBertSelfAttention(config)
        self.output = MyBertResidual(config, config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        mixed, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(mixed, hidden_states)


class MyBertIntermediate(nn.Module):
    """The wide half of the feed-forward network."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class MyBertLayer(GradientCheckpointingLayer):
    """Attention then feed-forward, each added to what it was given and normalised after."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = MyBertAttention(config)
        self.intermediate = MyBertIntermediate(config)
        self.output = MyBertResidual(config, config.intermediate_size)

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


class MyBertPooler(nn.Module):
    """What the first position says of the whole row."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return torch.tanh(self.dense(hidden_states[:, 0]))


class MyBertPredictionHeadTransform(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states):
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class MyBertLMPredictionHead(nn.Module):
    """Logits over the vocabulary; the product's weight is the token embedding's, its bias is its own."""

    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.transform = MyBertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's, under a second name in the files

    def forward(self, hidden_states):
        return self.decoder(self.transform(hidden_states))


class MyBertOnlyMLMHead(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.predictions = MyBertLMPredictionHead(config)


class MyBertPreTrainingHeads(nn.Module):
    def __init__(self, config: MyBertConfig):
        super().__init__()
        self.predictions = MyBertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class MyBertPreTrainedModel(PreTrainedModel):
    """What every BERT class shares."""

    config: MyBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MyBertEmbeddings", "MyBertLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]  # 0, 1, 2 ..., which BERT's first files hold
    _can_record_outputs = {"hidden_states": MyBertLayer, "attentions": MyBertSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MyBertLMPredictionHead):
            init.zeros_(module.bias)

    def _get_name(self):
        # the library looks classes up by this name, to know that a causal model's labels are to be shifted
        return self.config._stock_architectures.get(type(self).__name__, type(self).__name__)


class MyBertModel(MyBertPreTrainedModel):
    """The encoder without a head: token ids in, hidden states out."""

    def __init__(self, config: MyBertConfig, add_pooling_layer=True):
        super().__init__(config)
        self.embeddings = MyBertEmbeddings(config)
        self.encoder = MyBertEncoder(config)
        self.pooler = MyBertPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

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
        """Hidden states of the last layer, and the pooled first position of each row.

        Args:
            input_ids: (batch, length) token ids; or inputs_embeds (batch, length, hidden_size), not both.
            attention_mask: (batch, length), 1 for tokens to attend to and 0 for padding.
            token_type_ids: (batch, length), which of the two sentences a token belongs to; 0 where not given.
            position_ids: (batch, length), 0 to max_position_embeddings - 1; counted from 0 where not given.
            document_ids: (batch, length), equal within a document: no token attends to one of another document.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)
        rows, length = inputs_embeds.shape[:2]
        if token_type_ids is None:
            token_type_ids = torch.zeros(rows, length, dtype=torch.long, device=inputs_embeds.device)
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)

        mask = None  # nothing to hide from one another, which is the kernel's plain case
        if attention_mask is not None or document_ids is not None:

            def same_document(batch, head, query, key):
                return document_ids[batch, query] == document_ids[batch, key]

            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                and_mask_function=None if document_ids is None else same_document,
            )
        hidden_states = self.embeddings(inputs_embeds, token_type_ids, position_ids)
        hidden_states = self.encoder(hidden_states, mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states) if self.pooler is not None else None,
        )


class MyBertWithLMHead(MyBertPreTrainedModel):
    """What the two classes with a masked-LM head share."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value
        # untied, the files hold both: two names for one parameter would have one of them left out
        is_tied = self.config.tie_word_embeddings
        self.cls.predictions.bias = value.bias if is_tied else nn.Parameter(value.bias.detach().clone())

    def predict_masked(self, hidden_states, labels, masked_positions):
        """Logits and labels of the positions that the loss looks at.

        Returns all positions outside training, and those of `masked_positions` (batch, masked) where they are given:
        a fixed number a row, so that one compiled graph serves every batch.
        """
        if masked_positions is not None:
            index = masked_positions.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
            hidden_states = hidden_states.gather(1, index)
        elif self.training and labels is not None and not torch.compiler.is_compiling():
            labels = labels.view(hidden_states.shape[:2])  # stock takes them flat too
            is_masked = labels != -100
            hidden_states, labels = hidden_states[is_masked], labels[is_masked]
        return self.cls.predictions(hidden_states), labels


@dataclass
class MyBertForPreTrainingOutput(ModelOutput):
    """Output of [`MyBertForPreTraining`].

    loss: the sum of both losses, when both labels are given.
    prediction_logits: (batch, length, vocab_size), or those of the masked positions (see `forward`).
    seq_relationship_logits: (batch, 2), for "follows" and "does not follow".
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None


class MyBertForPreTraining(MyBertWithLMHead):
    """The encoder with BERT's two pre-training heads. On disk it is a stock BertForPreTraining."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # a cross-entropy of logits and labels, which both heads have
        self.bert = MyBertModel(config)
        self.cls = MyBertPreTrainingHeads(config)
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
        """Logits of both heads, and the sum of their mean cross-entropies in nats when both labels are given.

        Args:
            labels, masked_positions, num_items_in_batch: as in [`MyBertForMaskedLM`].
            next_sentence_label: (batch,), 0 where the second sentence follows the first, 1 where not, -100 ignored.
            num_pairs_in_batch: divide the summed next-sentence loss by this instead of by the number of labels here.
            skip_logits: give no logits of tokens, as in [`MyBertForMaskedLM`].
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits, labels = self.predict_masked(outputs.last_hidden_state, labels, masked_positions)
        relationship = self.cls.seq_relationship(outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch)
            pair_loss = self.loss_function(relationship, next_sentence_label, 2, num_pairs_in_batch)
            if num_items_in_batch is not None and num_pairs_in_batch is None:
                # the caller accumulates over micro-batches and knows of one count only: a share of the pairs' mean, too
                pair_loss = pair_loss * (labels != -100).sum() / num_items_in_batch
            loss = loss + pair_loss
        return MyBertForPreTrainingOutput(
            loss=loss,
            prediction_logits=None if skip_logits else logits,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MyBertForMaskedLM(MyBertWithLMHead):
    """The encoder with a masked-LM head. On disk it is a stock BertForMaskedLM."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.cls = MyBertOnlyMLMHead(config)
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
        """Logits over the vocabulary, and the mean cross-entropy in nats when labels are given.

        In training with labels, the head runs only where there is something to predict, and `logits` are
        (labels that are not ignored, vocab_size); otherwise (batch, length, vocab_size), as in the stock class.

        Args:
            labels: (batch, length) token ids, -100 where there is nothing to predict.
            masked_positions: (batch, masked) positions to run the head on. Labels are then (batch, masked), and logits
                (batch, masked, vocab_size), in training or not.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels here.
            skip_logits: give the loss alone. What is given back must be kept, and logits are large.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
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


class MyBertForSequenceClassification(MyBertPreTrainedModel):
    """The encoder with a classifier of whole rows. On disk it is a stock BertForSequenceClassification."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
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
        """Logits (batch, num_labels), and the loss when labels are given.

        Args:
            labels: (batch,) class ids; (batch, num_labels) of 0.0 and 1.0 when each class is a question of its own;
                (batch,) numbers to come close to when num_labels is 1. `config.problem_type` decides, and is set from
                the labels' shape and type where it is not.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MyBertForTokenClassification(MyBertPreTrainedModel):
    """The encoder with a classifier of each token. On disk it is a stock BertForTokenClassification."""

    def __init__(self, config: MyBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MyBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
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
        """Logits (batch, length, num_labels), and the mean cross-entropy when labels are given.

        Args:
            labels: (batch, length) class ids, -100 is ignored.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MyBertForQuestionAnswering(MyBertPreTrainedModel):
    """The encoder with a finder of answers in the text. On disk it is a stock BertForQuestionAnswering."""

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
        """Logits (batch, length) of where an answer starts and where it ends, and the mean of both cross-entropies.

        Args:
            start_positions, end_positions: (batch,) positions of the answer's first and last token; one that lies
                beyond the row is ignored.
            The others as in [`MyBertModel`].
        """
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
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


def _classifier_dropout(config):
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
