//! What a worker of the command line does with its models before requests ask for them.

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;

/// Models that a worker loads at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct PreWarmingConfig {
    /// Their names; left out: those that the worker was given by name.
    #[garde(inner(inner(custom(rules::not_empty))))]
    pub models: Option<Vec<String>>,
    /// When the worker joins the fleet.
    #[serde(alias = "register_when")]
    pub register_when: RegisterWhen,
    /// A model that takes longer to load, in milliseconds, counts as failed; left out: none does.
    #[serde(alias = "timeout_per_model_ms")]
    #[garde(inner(range(min = 1, max = rules::SPAN_MAX_MS)))]
    pub timeout_per_model_ms: Option<u64>,
}

/// When a worker joins the fleet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RegisterWhen {
    /// At once: requests for models that are still being loaded wait at the worker.
    Warming,
    /// When each of its models is loaded, or has failed.
    #[default]
    Complete,
}
