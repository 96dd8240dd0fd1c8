"""What the encoder-decoder families share: attention with a cache, the forward passes of a stack and of the model.

On the same weights, a family computes exactly what its stock class computes. Without padding no mask is built, so that
the fused kernels run: see models/t5 and models/bart for what differs.
"""

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .decoder import make_causal_mask
from .loss import IGNORE_INDEX, fuses_head_and_loss, linear_cross_entropy
from .stock import Attention


def shift_tokens_right(labels, pad_token_id, decoder_start_token_id):
    """Return the decoder's inputs (batch, length) for some labels: each position reads the label before its own.

    Raises:
        ValueError: one of the two tokens is None.
    """
    for name, token_id in (("pad_token_id", pad_token_id), ("decoder_start_token_id", decoder_start_token_id)):
        if token_id is None:
            raise ValueError(f"config.{name} is not set; set it, or pass decoder_input_ids")
    shifted = labels.roll(1, -1)
    shifted[..., 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == IGNORE_INDEX, pad_token_id)


def clamp_fp16(hidden_states):
    """Return the hidden states of a layer without infinities, which fp16 overflows to."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max
    limit = torch.where(hidden_states.isinf().any(), limit - 1000, limit)
    return hidden_states.clamp(-limit, limit)


class EncoderDecoderAttention(Attention):
    """Multi-head attention: of a stack to itself, or of the decoder to the encoder's output (cross-attention).

    A family sets `projections`, the names of the query, key, value and output projections in its checkpoints.
    """

    projections = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config, layer_idx, num_heads, head_dim, scaling, dropout, bias, is_causal=False):
        super().__init__(config, head_dim, scaling, dropout, is_causal)
        self.layer_idx = layer_idx
        width, inner = config.d_model, num_heads * head_dim
        for name in self.projections[:3]:
            setattr(self, name, nn.Linear(width, inner, bias=bias))
        setattr(self, self.projections[3], nn.Linear(inner, width, bias=bias))

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **kwargs):
        """Return the output (batch, length, d_model) and, with eager attention, the weights.

        Args:
            encoder_hidden_states: (batch, encoder length, d_model) for cross-attention.
            past_key_values: an `EncoderDecoderCache`. The keys and values of the encoder are computed once.
        """
        query_projection, key_projection, value_projection, output_projection = (
            getattr(self, name) for name in self.projections
        )
        is_cross, cache = encoder_hidden_states is not None, None
        if past_key_values is not None:
            cache = past_key_values.cross_attention_cache if is_cross else past_key_values.self_attention_cache
        if is_cross and cache is not None and past_key_values.is_updated.get(self.layer_idx):
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = encoder_hidden_states if is_cross else hidden_states
            key, value = self.split_heads(key_projection(source)), self.split_heads(value_projection(source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if is_cross:
                    past_key_values.is_updated[self.layer_idx] = True
        query = self.split_heads(query_projection(hidden_states))
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return output_projection(output), weights


class StackMixin:
    """Forward pass of an encoder or a decoder.

    The class has the modules `embed_tokens` and `layers`, the attribute `is_decoder`, and overrides `embed` and, if it
    normalizes the output, `finish`. A layer returns its hidden states and the mask for the next layer.
    """

    def embed(self, inputs_embeds, start, num_keys):
        """Return the input of the first layer, and the keyword arguments of every layer.

        Args:
            start: position of the first token, which is the number of tokens in the cache.
            num_keys: number of positions that the tokens attend to.
        """
        raise NotImplementedError

    def finish(self, hidden_states):
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        use_cache=None,
        **kwargs,
    ):
        """Return the hidden states of the last layer.

        Args:
            input_ids: (batch, length) token ids; or inputs_embeds (batch, length, d_model), not both.
            attention_mask: (batch, length of cache and input), 1 for tokens and 0 for padding.
            encoder_hidden_states: (batch, encoder length, d_model), which a decoder attends to.
            encoder_attention_mask: (batch, encoder length), 1 for tokens and 0 for padding.
            past_key_values: an `EncoderDecoderCache`; a decoder creates one when `use_cache` is true.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            prefix = "decoder_" if self.is_decoder else ""
            raise ValueError(f"pass exactly one of {prefix}input_ids and {prefix}inputs_embeds, or labels")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        start, num_keys, cross_mask = 0, inputs_embeds.shape[1], None
        if not self.is_decoder:
            past_key_values = None
            if attention_mask is not None:
                attention_mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        else:
            if use_cache and past_key_values is None:
                past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
            cache = None if past_key_values is None else past_key_values.self_attention_cache
            if cache is not None:
                start, num_keys = cache.get_seq_length(), cache.get_mask_sizes(num_keys, 0)[0]
            attention_mask = make_causal_mask(self.config, inputs_embeds, attention_mask, cache, None, "full_attention")
            if encoder_hidden_states is not None and encoder_attention_mask is not None:
                cross_mask = create_bidirectional_mask(
                    self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states
                )
        hidden_states, layer_options = self.embed(inputs_embeds, start, num_keys)
        for layer in self.layers:
            hidden_states, attention_mask = layer(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                cross_mask,
                past_key_values=past_key_values,
                **layer_options,
                **kwargs,
            )
        hidden_states = self.finish(hidden_states)
        if not self.is_decoder:
            return BaseModelOutput(last_hidden_state=hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )


class EncoderDecoderMixin:
    """Forward pass of an encoder and a decoder; the class has the modules `shared`, `encoder` and `decoder`."""

    reads_own_inputs = False  # without decoder inputs, whether the decoder reads the shifted inputs of the encoder

    def get_input_embeddings(self):
        return self.shared

    def set_input_embeddings(self, value):
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """Return the hidden states of the decoder's last layer.

        Args:
            input_ids: (batch, length) token ids of the encoder; or inputs_embeds (batch, length, d_model).
            attention_mask: (batch, length), 1 for tokens and 0 for padding of the encoder.
            decoder_input_ids: (batch, decoder length); or decoder_inputs_embeds (batch, decoder length, d_model).
            decoder_attention_mask: (batch, length of cache and decoder input).
            encoder_outputs: outputs of the encoder, which then does not run; a tuple or a `BaseModelOutput`.
            past_key_values: an `EncoderDecoderCache` of the decoder's positions before these.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, use_cache=False, return_dict=True, **kwargs
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        if self.reads_own_inputs and input_ids is not None and decoder_input_ids is None is decoder_inputs_embeds:
            decoder_input_ids = shift_tokens_right(
                input_ids, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs[0],
            attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class ConditionalGenerationMixin(GenerationMixin):
    """An encoder-decoder with a language-modeling head, `lm_head`; the class overrides `run_body`.

    It may have a buffer `final_logits_bias` (1, vocab_size), which is added to the logits.
    """

    output_scale = 1.0  # the decoder's output is multiplied by it

    def run_body(self, *arguments, **options):
        """Return the outputs of [`EncoderDecoderMixin.forward`]."""
        raise NotImplementedError

    def prepare_decoder_input_ids_from_labels(self, labels):
        return shift_tokens_right(labels, self.config.pad_token_id, self.config.decoder_start_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        """Return logits (batch, decoder length, vocab_size), and the mean cross-entropy in nats if labels are given.

        Args:
            labels: (batch, decoder length) token ids of the decoder's outputs; -100 is ignored. Without decoder inputs,
                these are the labels shifted to the right.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels in this batch.
            skip_logits: return the loss only, as in [`~decoder.CausalLMMixin`].
            The others as in [`EncoderDecoderMixin`].
        """
        skip_logits = kwargs.pop("skip_logits", False)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.run_body(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if self.output_scale != 1.0:
            hidden_states = hidden_states * self.output_scale
        logits_bias = getattr(self, "final_logits_bias", None)
        if skip_logits and labels is not None and fuses_head_and_loss(self.lm_head, hidden_states):
            loss = linear_cross_entropy(self.lm_head, hidden_states, labels, num_items_in_batch, logits_bias)
        else:
            logits = self.lm_head(hidden_states)
            if logits_bias is not None:
                logits += logits_bias  # in place: logits are the largest tensor of a step
        if labels is not None and loss is None:
            loss = self.loss_function(
                logits,
                labels,
                self.config.vocab_size,
                shift_labels=labels,  # they are aligned with the outputs already
                num_items_in_batch=num_items_in_batch,
            )
        body = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=None if skip_logits else logits, **body)
