"""InternLM2 as a reward model, for transformers 4.44 to 5: a decoder, and one number read at a
sequence's last token.

Rewards do not depend on padding side, batch size or neighbours: positions are counted over the
tokens that the attention mask keeps, and rotary frequencies are computed in each call (a buffer
outside the state dict would come back uninitialised in transformers 5). There is no key/value
cache: a reward is read once.

Shape letters: B batch, T tokens, h hidden size, a query heads, g key/value groups, d head
dimension.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .configuration_internlm2 import InternLM2Config


def rotary_tables(config, position_ids, dtype):
    """cos and sin [B, 1, T, d] for positions [B, T], computed in fp32 and rounded to ``dtype`` at
    the end."""
    scaling = config.rope_parameters
    kind = scaling["rope_type"]
    d, device = config.head_dim, position_ids.device
    base = torch.full(
        (position_ids.shape[0], 1), float(scaling["rope_theta"]), device=device
    )  # [B, 1]
    if kind == "dynamic":
        # A sequence longer than the model was trained on gets a larger base: by its own length, not
        # the batch's.
        length = (position_ids.amax(dim=1, keepdim=True) + 1).clamp_min(
            config.max_position_embeddings
        )
        stretch = scaling["factor"] * length / config.max_position_embeddings - (
            scaling["factor"] - 1
        )
        base = base * stretch ** (d / (d - 2))
    exponent = torch.arange(0, d, 2, device=device, dtype=torch.float32) / d
    frequency = 1.0 / base**exponent  # [B, d/2]
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(
            0, 1
        )  # 1: fast, left alone; 0: slow, stretched in full
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    elif kind not in ("default", "dynamic"):
        raise ValueError(f"rotary scaling of type {kind} is not supported")
    angle = position_ids[:, :, None].float() * frequency[:, None, :]
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate [B, heads, T, d]: the first half of a head is paired with its second half."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class InternLM2RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(
            x.dtype
        )


class InternLM2Attention(nn.Module):
    """``wqkv`` holds, for each key/value group, its query heads, its key and its value."""

    def __init__(self, config):
        super().__init__()
        self.groups, self.head_dim = config.num_key_value_heads, config.head_dim
        self.per_group = config.num_attention_heads // self.groups
        width = (config.num_attention_heads + 2 * self.groups) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, width, bias=False)
        self.wo = nn.Linear(
            config.num_attention_heads * self.head_dim, config.hidden_size, bias=False
        )

    def forward(self, x, cos, sin, mask):
        B, T, _ = x.shape
        qkv = self.wqkv(x).view(B, T, self.groups, self.per_group + 2, self.head_dim)
        q, k, v = qkv.split([self.per_group, 1, 1], dim=3)  # [B, T, g, 1 or a/g, d]
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part.repeat_interleave(self.per_group, dim=1) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(mixed.transpose(1, 2).reshape(B, T, -1))


class InternLM2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)  # gate
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)  # up
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)  # down

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["InternLM2DecoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, InternLM2RMSNorm):
            nn.init.ones_(module.weight)


class InternLM2Model(InternLM2PreTrainedModel):
    """The decoder: last hidden states [B, T, h], after the final norm."""

    def __init__(self, config):
        super().__init__(config)
        if config.bias or config.hidden_act != "silu":
            raise ValueError(
                "attention biases and activations other than silu are not supported: see"
                f" config.json (bias={config.bias}, hidden_act={config.hidden_act})"
            )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        return_dict=True,
        **unused,
    ):
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        kept = (
            torch.ones(B, T, dtype=torch.bool, device=x.device)
            if attention_mask is None
            else attention_mask.bool()
        )
        if position_ids is None:
            position_ids = (kept.cumsum(dim=1) - 1).clamp_min(0)
        cos, sin = rotary_tables(self.config, position_ids, x.dtype)
        mask = None
        if T > 1 and not bool((kept[:, 1:] <= kept[:, :-1]).all()):
            # Something other than right padding. (Padding on the right is never seen by a token
            # before it.) Every position sees itself, so that a row of padding gives numbers, not
            # NaN.
            ones = torch.ones(T, T, dtype=torch.bool, device=x.device)
            mask = (
                kept[:, None, :] & ones.tril() | torch.eye(T, dtype=torch.bool, device=x.device)
            )[:, None]
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        x = self.norm(x)
        return BaseModelOutput(last_hidden_state=x) if return_dict else (x,)


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
    """``logits`` [B, 1]: the reward, read at the last token that the attention mask keeps (the
    reward token)."""

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.reward_token_id = config.reward_token_id  # read by RewardBench
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        return_dict=True,
        **unused,
    ):
        hidden = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds
        ).last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        last = (
            hidden.shape[1] - 1
            if attention_mask is None
            else attention_mask.cumsum(dim=1).argmax(dim=1)
        )
        # One number per sequence: fp32 costs nothing and keeps close rewards apart.
        logits = F.linear(hidden[rows, last].float(), self.v_head.weight.float())
        return SequenceClassifierOutput(logits=logits) if return_dict else (logits,)

    @torch.no_grad()
    def get_scores(self, tokenizer, conversations, batch_size=8, **kwargs):
        """Rewards of conversations (each a list of {"role", "content"}), as floats in the order
        given. ``kwargs`` go to ``forward``, as in the published class."""
        texts = [
            tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=False)
            for c in conversations
        ]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        reward = self.reward_token_id
        ids = [i if reward in (None, i[-1]) else [*i, reward] for i in ids]
        # similar lengths together: little padding
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = [0.0] * len(ids)
        for start in range(0, len(ids), batch_size):
            chosen = order[start : start + batch_size]
            length = max(len(ids[i]) for i in chosen)
            tokens = torch.zeros(len(chosen), length, dtype=torch.long)  # [B, T]
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            logits = self(tokens.to(self.device), mask.to(self.device), **kwargs)[0]  # [B, 1]
            for row, i in enumerate(chosen):
                scores[i] = logits[row, 0].item()
        return scores

    def get_score(self, tokenizer, conversation, **kwargs):
        """Reward of one conversation."""
        return self.get_scores(tokenizer, [conversation], **kwargs)[0]

    def compare(self, tokenizer, conversation1, conversation2, return_logits=False, **kwargs):
        """Whether the first conversation has the higher reward; with ``return_logits`` the two
        rewards."""
        first, second = self.get_scores(tokenizer, [conversation1, conversation2], **kwargs)
        return (first, second) if return_logits else first > second

    def rank(self, tokenizer, conversations, return_logits=False, **kwargs):
        """Indices of the conversations, the best first; with ``return_logits`` their rewards, in
        the order given."""
        scores = self.get_scores(tokenizer, conversations, **kwargs)
        if return_logits:
            return scores
        return sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
