"""BERT: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.

On the same weights these classes compute what the stock BERT classes compute. Without padding no mask is built. The
models with a head are in bert_heads.py.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BertConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertPooler, BertSelfOutput
from transformers.pytorch_utils import apply_chunking_to_forward
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
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        output, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(output, hidden_states)


class MyBertIntermediate(BertIntermediate):
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
        self.output = BertOutput(config)

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
        self.pooler = BertPooler(config) if add_pooling_layer else None
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

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
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
