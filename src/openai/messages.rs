//! Messages as every worker takes them: contents that came in parts are joined; a part that is no text is refused.

use std::borrow::Cow;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use super::body::{Object, starts_with, unsuitable};
use crate::error::ControllerError;
use crate::wire::Json;

/// A message.
#[derive(Deserialize)]
#[serde(transparent)]
struct Message<'a>(#[serde(borrow)] Object<'a>);

/// A part of a content.
#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    refusal: Option<Cow<'a, str>>,
}

/// Checks the contents of messages, and joins the parts of those that have some. Roles are not looked at.
///
/// # Errors
/// REQUEST_VALIDATION_FAILED names the message, and the part, that is not what a worker takes.
pub(super) fn read(raw: &RawValue) -> Result<Json, ControllerError> {
    let mut messages: Vec<Message<'_>> = serde_json::from_str(raw.get())
        .map_err(|_| unsuitable("messages", raw, r#"a list of objects such as {"role": "user", "content": "Hello"}"#))?;
    let mut joined = false;
    for (index, message) in messages.iter_mut().enumerate() {
        if let Some(content) = message.content() {
            let name = || format!("messages[{index}].content");
            if starts_with(content, b'[') {
                let text = join(&name(), content)?;
                *content =
                    Cow::Owned(serde_json::value::to_raw_value(&text).map_err(|_| unsuitable(&name(), content, "a text"))?);
                joined = true;
            } else if content.get() != "null" && serde_json::from_str::<Cow<'_, str>>(content.get()).is_err() {
                return Err(unsuitable(&name(), content, "a text or a list of text parts"));
            }
        }
    }
    if joined { Json::from_value(&messages).map_err(|_| unsuitable("messages", raw, "a list")) } else { Ok(raw.into()) }
}

fn join(name: &str, content: &RawValue) -> Result<String, ControllerError> {
    const WANTED: &str = r#"a list of parts such as {"type": "text", "text": "Hello"}"#;
    let parts: Vec<&RawValue> = serde_json::from_str(content.get()).map_err(|_| unsuitable(name, content, WANTED))?;
    let mut text = String::new();
    for (index, raw) in parts.into_iter().enumerate() {
        let name = format!("{name}[{index}]");
        let part: Part<'_> = serde_json::from_str(raw.get())
            .map_err(|_| unsuitable(&name, raw, r#"an object such as {"type": "text", "text": "Hello"}"#))?;
        match (&*part.kind, part.text, part.refusal) {
            ("text", Some(piece), _) | ("refusal", _, Some(piece)) => text.push_str(&piece),
            ("text", None, _) => return Err(ControllerError::validation(&name, "is a text part without text")),
            ("image_url" | "input_audio" | "file", ..) => {
                let message = format_args!("is a part of type {}; the models here take text alone", part.kind);
                return Err(ControllerError::validation(&name, message));
            }
            _ => return Err(ControllerError::validation(&name, "is a part of unknown type; the models here take text alone")),
        }
    }
    Ok(text)
}

// === impl Message ===

impl<'a> Message<'a> {
    fn content(&mut self) -> Option<&mut Cow<'a, RawValue>> {
        self.0.0.iter_mut().find(|(key, _)| key == "content").map(|(_, value)| value)
    }
}

impl Serialize for Message<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.0.len()))?;
        for (key, value) in &self.0.0 {
            map.serialize_entry(key, &**value)?;
        }
        map.end()
    }
}
