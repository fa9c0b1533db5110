"""Networks: tokenizer, dynamics, heads and the agent that joins them."""

from dreamer.models.agent import Agent, AgentConfig
from dreamer.models.causal_tokenizer import CausalTokenizer, CausalTokenizerConfig
from dreamer.models.cosmos_tokenizer_wrapper import (
    CosmosTokenizerConfig,
    CosmosTokenizerWrapper,
    create_cosmos_tokenizer,
    create_cosmos_tokenizer_from_config,
)
from dreamer.models.dynamics import Dynamics, DynamicsConfig, DynamicsOutput
from dreamer.models.heads import ActionDistribution, ContinueHead, HeadConfig, PolicyHead, ScalarHead
from dreamer.models.transformer import Transformer, TransformerConfig

__all__ = [
    "ActionDistribution",
    "Agent",
    "AgentConfig",
    "CausalTokenizer",
    "CausalTokenizerConfig",
    "ContinueHead",
    "CosmosTokenizerConfig",
    "CosmosTokenizerWrapper",
    "Dynamics",
    "DynamicsConfig",
    "DynamicsOutput",
    "HeadConfig",
    "PolicyHead",
    "ScalarHead",
    "Transformer",
    "TransformerConfig",
    "create_cosmos_tokenizer",
    "create_cosmos_tokenizer_from_config",
]
