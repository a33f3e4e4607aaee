"""Configuration of an InternLM2 reward model, for transformers 4.44 to 5."""

from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    """Field names and defaults are those of the published InternLM2 configuration, so its folders
    can be read."""

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=103168,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        reward_token_id=92527,
        pretraining_tp=1,
        tie_word_embeddings=False,
        bias=True,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.reward_token_id = reward_token_id
        self.pretraining_tp = pretraining_tp
        self.bias = bias
        # One form inside, whichever form config.json has; transformers 5 knows only this one.
        given = rope_parameters or rope_scaling or {}
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **given}
        if "type" in self.rope_parameters:
            self.rope_parameters["rope_type"] = self.rope_parameters.pop("type")
        self.rope_theta = self.rope_parameters["rope_theta"]
        if not isinstance(getattr(PretrainedConfig, "rope_scaling", None), property):
            # Before transformers 5, serving engines read the older form.
            scaling = {
                key: value for key, value in self.rope_parameters.items() if key != "rope_theta"
            }
            self.rope_scaling = (
                None
                if scaling["rope_type"] == "default"
                else {"type": scaling["rope_type"], **scaling}
            )
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
