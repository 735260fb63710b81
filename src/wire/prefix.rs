//! What prompts begin with, as hashes: those of a heartbeat's `cachedPrefixes`. docs/prefix-hashes.md is the definition.
//!
//! A prompt is hashed once, from its beginning; what the hash is at certain places of the text names the text up to there.
//! Two prompts have a hash in common when they serve the same model and begin with the same text up to such a place. The
//! places lie further apart the further they are from the beginning, so that any prompt has few: 64 in the first MiB.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{InferenceRequest, Json};
use crate::fnv;

/// So many hashes has a heartbeat at most; what one names beyond is ignored.
pub const MOST_CACHED_PREFIXES: usize = 256;
/// The first place where a hash is taken, and the unit of the distances between places.
const BLOCK: u64 = 256;
/// A place is followed by the next one after an eighth of its distance from the beginning, or after a block.
const PART: u64 = 8;
/// Ends a role, and a content.
const MARKS: [&[u8]; 2] = [b"\x1f", b"\x1e"];

/// The hashes of the prefixes of one prompt, the shortest first. Cheap to clone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PrefixHashes {
    hashes: Arc<[u64]>,
    bytes: u64,
}

/// A hash on its way through a text.
struct Reader {
    hash: u64,
    at: u64,
    next: u64,
    taken: Vec<u64>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

/// Borrows a text where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
}

// === impl PrefixHashes ===

impl PrefixHashes {
    /// Those of a request: of its prompt, or of the roles and contents of its messages.
    #[must_use]
    pub fn of(request: &InferenceRequest) -> Self {
        match (&request.prompt, &request.messages) {
            (Some(prompt), _) => Self::of_prompt(&request.model_id, prompt),
            (None, Some(messages)) => Self::of_messages(&request.model_id, messages),
            (None, None) => Self::default(),
        }
    }

    /// Those of a plain text.
    #[must_use]
    pub fn of_prompt(model_id: &str, prompt: &str) -> Self {
        let mut reader = Reader::new(model_id);
        reader.read(prompt.as_bytes());
        reader.into()
    }

    /// Those of a conversation; none of one that is not as the wire has it.
    #[must_use]
    pub fn of_messages(model_id: &str, messages: &Json) -> Self {
        let mut reader = Reader::new(model_id);
        match reader.read_messages(messages) {
            Ok(()) => reader.into(),
            Err(_) => Self::default(),
        }
    }

    /// The hash that a heartbeat names: sixteen hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<u64> {
        let fits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        fits.then(|| u64::from_str_radix(text, 16).ok()).flatten()
    }

    /// The hashes, that of the shortest prefix first.
    #[must_use]
    pub fn hashes(&self) -> &[u64] {
        &self.hashes
    }

    /// How long the whole text is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Says how many there are: they tell whether two prompts are the same.
impl fmt::Debug for PrefixHashes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} prefixes of {} bytes>", self.hashes.len(), self.bytes)
    }
}

impl From<Reader> for PrefixHashes {
    fn from(reader: Reader) -> Self {
        Self { bytes: reader.at, hashes: reader.taken.into() }
    }
}

// === impl Reader ===

impl Reader {
    fn new(model_id: &str) -> Self {
        let hash = fnv::add(fnv::add(fnv::START, model_id.as_bytes()), b"\0");
        Self { hash, at: 0, next: BLOCK, taken: Vec::with_capacity(32) }
    }

    fn read(&mut self, mut bytes: &[u8]) {
        loop {
            let room = usize::try_from(self.next - self.at).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.hash = fnv::add(self.hash, now);
            self.at += now.len() as u64;
            if self.at < self.next {
                return;
            }
            self.taken.push(self.hash);
            self.next = following(self.next);
            bytes = later;
        }
    }

    fn read_messages(&mut self, messages: &Json) -> serde_json::Result<()> {
        let messages: Vec<Message<'_>> = serde_json::from_str(messages.text())?;
        let [after_role, after_content] = MARKS;
        for Message { role, content } in messages {
            self.read(role.as_bytes());
            self.read(after_role);
            match content.map(RawValue::get) {
                Some(list) if list.starts_with('[') => {
                    for Part { text } in serde_json::from_str::<Vec<Part<'_>>>(list)? {
                        self.read(text.unwrap_or_default().as_bytes());
                    }
                }
                Some("null") | None => {}
                Some(text) => self.read(serde_json::from_str::<Text<'_>>(text)?.0.as_bytes()),
            }
            self.read(after_content);
        }
        Ok(())
    }
}

/// The place after one where a hash is taken.
fn following(place: u64) -> u64 {
    place + BLOCK * (place / (BLOCK * PART)).max(1)
}

/// How many bytes the prefix has whose hash is at this index.
#[must_use]
pub fn prefix_bytes(index: usize) -> u64 {
    (0..index).fold(BLOCK, |place, _| following(place))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn places_are_few_and_never_further_apart_than_an_eighth() {
        let places: Vec<u64> = (0..64).map(prefix_bytes).collect();
        assert_eq!(places[..10], [256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 2560]);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] <= (pair[0] / 8).max(256)));
        assert_eq!(PrefixHashes::of_prompt("m", &"x".repeat(1 << 20)).hashes().len(), 64);
    }

    #[test]
    fn pieces_make_no_difference() {
        let text = "the same text ".repeat(500);
        let mut reader = Reader::new("m");
        text.as_bytes().chunks(37).for_each(|piece| reader.read(piece));
        assert_eq!(PrefixHashes::from(reader), PrefixHashes::of_prompt("m", &text));
    }

    #[test]
    fn what_is_no_hash_is_none() {
        assert_eq!(PrefixHashes::parse("00000000000000ff"), Some(255));
        for wrong in ["", "ff", "+0000000000000ff", "00000000000000fg", "000000000000000ff"] {
            assert_eq!(PrefixHashes::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_conversation_that_cannot_be_read_has_none() {
        let long = "x".repeat(1000);
        let of = |content: &str| {
            let text = format!(r#"[{{"role": "user", "content": "{long}"}}, {{"role": "user", "content": {content}}}]"#);
            PrefixHashes::of_messages("m", &Json::from_text(text).unwrap()).hashes().len()
        };
        assert_eq!((of(r#""Hello""#), of("null"), of("5"), of(r#""\ud800""#)), (3, 3, 0, 0));
    }

    #[test]
    fn nothing_of_the_prompt_is_printed() {
        assert_eq!(format!("{:?}", PrefixHashes::of_prompt("m", &"x".repeat(600))), "<2 prefixes of 600 bytes>");
    }
}
