//! The functions that a model wants called, in the shape that clients rely on: each with an id and with its arguments as
//! a text of JSON, whatever the worker sent.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::Json;

/// A call.
#[derive(Serialize)]
pub(super) struct ToolCall {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: Function,
}

/// What is called.
#[derive(Serialize)]
pub(super) struct Function {
    pub name: String,
    pub arguments: String,
}

#[derive(Deserialize)]
struct Given {
    id: Option<String>,
    function: GivenFunction,
}

#[derive(Deserialize)]
struct GivenFunction {
    name: String,
    arguments: Option<Box<RawValue>>,
}

/// Reads a worker's calls. Those without an id get one made of the answer's.
///
/// # Errors
/// WORKER_UNAVAILABLE where they are in no shape that could be meant: an answer without them would look complete.
pub(super) fn read(calls: Option<&Json>, answer_id: &str) -> Result<Vec<ToolCall>, ControllerError> {
    let Some(calls) = calls else { return Ok(Vec::new()) };
    let given: Vec<Given> = calls.read().map_err(|_| {
        let message = "the worker broke the protocol: its tool calls are not in the OpenAI API's shape";
        ControllerError::new(ControllerErrorCode::WorkerUnavailable, message).with("protocolError", "toolCalls")
    })?;
    Ok(given.into_iter().enumerate().map(|(index, call)| call.complete(index, answer_id)).collect())
}

// === impl Given ===

impl Given {
    fn complete(self, index: usize, answer_id: &str) -> ToolCall {
        let arguments = self.function.arguments.map_or_else(
            || "{}".to_owned(),
            |raw| serde_json::from_str::<String>(raw.get()).unwrap_or_else(|_| raw.get().to_owned()),
        );
        ToolCall {
            id: self.id.filter(|id| !id.is_empty()).unwrap_or_else(|| format!("call_{answer_id}_{index}")),
            kind: "function",
            function: Function { name: self.function.name, arguments },
        }
    }
}
