//! What of a configuration may be shown: everything but passwords, keys and the credentials in URLs.

use serde_json::Value;

use super::ClusterConfig;
use super::error::snake;

/// Stands for a secret.
pub(super) const HIDDEN: &str = "***";

/// Whether the value of this key is a secret.
pub(super) fn is_secret(key: &str) -> bool {
    matches!(snake(key).as_str(), "password" | "api_keys" | "api_key" | "key")
}

/// A URL without user, password, token and query. Whatever stands before the last `@` counts as credentials, since a
/// password may hold any character.
pub(super) fn url(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let separator = if scheme.is_empty() { "" } else { "://" };
    let (user, address) = rest.rsplit_once('@').map_or(("", rest), |(_, address)| ("***@", address));
    let (address, query) = address.split_once('?').map_or((address, ""), |(address, _)| (address, "?***"));
    format!("{scheme}{separator}{user}{address}{query}")
}

// === impl ClusterConfig ===

impl ClusterConfig {
    /// The whole configuration for logs and people, camelCase, with `***` in place of secrets.
    #[must_use]
    pub fn redacted(&self) -> Value {
        let mut shown = serde_json::to_value(self).unwrap_or_default();
        hide(&mut shown, false);
        shown
    }
}

fn hide(value: &mut Value, secret: bool) {
    match value {
        Value::String(text) if secret => HIDDEN.clone_into(text),
        Value::String(text) if text.contains("://") => *text = url(text),
        Value::Array(items) => items.iter_mut().for_each(|item| hide(item, secret)),
        // Of an object among secrets the secret has a key of its own; names and limits may be seen.
        Value::Object(entries) => entries.iter_mut().for_each(|(key, value)| hide(value, is_secret(key))),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_in_urls_are_hidden() {
        for (given, shown) in [
            ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
            ("nats://user:secret@host:4222", "nats://***@host:4222"),
            ("nats://token@host", "nats://***@host"),
            ("nats://user:sec/r@et@host", "nats://***@host"),
            ("http://host:1/v1?key=secret", "http://host:1/v1?***"),
            ("user:secret@host", "***@host"),
        ] {
            assert_eq!(url(given), shown);
        }
    }
}
