//! What a worker is set to, checked before anything starts.

use std::collections::BTreeMap;

use crate::config::{NatsConfig, NatsMode, ServerUrls};
use crate::error::{ControllerError, ControllerErrorCode};
use crate::wire::{Feature, WorkerId};

/// What a worker is.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Its name; made of the host's name where none is given.
    pub worker_id: Option<WorkerId>,
    /// What it serves.
    pub models: Vec<String>,
    /// How many jobs the engine works on at a time, at least 1; 0: no limit (local workers).
    pub max_concurrent: u32,
    /// How many more may wait.
    pub max_queue: u32,
    /// What it can do beyond answering; `cancel` is the runtime's own and always among them.
    pub features: Vec<Feature>,
    /// Where the models lie; for people to read, in the registration.
    pub files: ModelFiles,
}

/// The files of a worker's models.
#[derive(Clone, Debug, Default)]
pub struct ModelFiles {
    /// Of the models that lie on this machine, by name.
    pub paths: BTreeMap<String, String>,
    /// Their size together, in bytes.
    pub size: u64,
    /// When they were looked for, in milliseconds since the epoch; now where it is none.
    pub last_scanned: Option<u64>,
}

/// The models, each once.
pub(super) fn models(models: Vec<String>) -> Result<Vec<String>, ControllerError> {
    if models.is_empty() {
        return Err(ControllerError::validation("models", "is empty; name at least one model that the worker serves"));
    }
    let mut checked: Vec<String> = Vec::with_capacity(models.len());
    for model in models {
        if model.is_empty() || model.len() > 512 || model.chars().any(char::is_control) {
            let shown: String = model.chars().take(80).collect();
            let message = format!("{shown:?} is no name of a model: 1 to 512 bytes without control characters are allowed");
            return Err(ControllerError::validation("models", message));
        }
        if !checked.contains(&model) {
            checked.push(model);
        }
    }
    Ok(checked)
}

/// Where NATS is for a worker, which starts no server of its own.
pub(super) fn reachable(config: &NatsConfig, url: Option<String>) -> Result<NatsConfig, ControllerError> {
    let refused = |message: &str| Err(ControllerError::new(ControllerErrorCode::NatsError, message));
    let servers = match (url, config.mode, config.embedded.port) {
        (Some(url), _, _) => ServerUrls::One(url),
        (None, NatsMode::External, _) => config.server_url.clone(),
        (None, NatsMode::None, _) => {
            return refused(
                "nats.mode is none, and a worker of its own process is reached over NATS alone: set nats.mode to external and \
                 nats.serverUrl to the server, or add the worker to its controller with add_local_worker",
            );
        }
        (None, NatsMode::Embedded, 0) => {
            return refused(
                "nats.embedded.port is 0, any free port, so the worker cannot know where its controller's NATS server listens: \
                 set the port, or set nats.mode to external and nats.serverUrl to the server",
            );
        }
        (None, NatsMode::Embedded, port) => ServerUrls::One(format!("nats://127.0.0.1:{port}")),
    };
    Ok(NatsConfig { server_url: servers, ..config.clone() })
}
