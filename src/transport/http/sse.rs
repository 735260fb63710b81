//! Server-sent events, as they come in pieces of any size.
//!
//! After "Server-sent events" of the HTML standard: lines end with LF, CR LF or CR; `data:` may be followed by one space;
//! several `data` lines are one text; comments are nothing. It is kinder in one respect: what stands before the end of the
//! body counts, whether or not an empty line follows. Pure; how much it keeps is bounded.

/// The longest line, and the longest text of an event, in bytes, where nothing else is said.
const LONGEST: usize = 1 << 20;

/// Takes bytes, gives events.
pub(super) struct Decoder {
    /// The longest line, and the longest text of an event.
    longest: usize,
    buffer: Vec<u8>,
    /// What has been read of the buffer.
    start: usize,
    /// Of what has not been read, so much has no end of a line in it.
    scanned: usize,
    /// A line feed that comes now belongs to the end of the line before.
    after_return: bool,
    begun: bool,
    data: Vec<u8>,
    has_data: bool,
    is_error: bool,
    /// The event was given out: the next line begins another one.
    given: bool,
}

/// An event with data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event<'a> {
    pub(super) data: &'a [u8],
    /// It calls itself `error`.
    pub(super) is_error: bool,
}

/// There is more of it than anybody means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooLong;

// === impl Decoder ===

impl Default for Decoder {
    fn default() -> Self {
        Self::with_longest(LONGEST)
    }
}

impl Decoder {
    /// One whose lines and events may have so many bytes.
    pub(super) fn with_longest(longest: usize) -> Self {
        Self {
            longest,
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            after_return: false,
            begun: false,
            data: Vec::new(),
            has_data: false,
            is_error: false,
            given: false,
        }
    }

    /// Takes what came. To be emptied with [`Self::next`] before more is given to it.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The body is over: what is left is a line, and the event is complete.
    pub(super) fn end(&mut self) {
        self.push(b"\n\n");
    }

    /// The next event that is complete.
    pub(super) fn next(&mut self) -> Result<Option<Event<'_>>, TooLong> {
        if std::mem::take(&mut self.given) {
            self.data.clear();
            (self.has_data, self.is_error) = (false, false);
        }
        while let Some((from, to)) = self.line()? {
            let line = &self.buffer[from..to];
            if line.is_empty() {
                if self.has_data {
                    self.given = true;
                    return Ok(Some(Event { data: &self.data, is_error: self.is_error }));
                }
                self.is_error = false;
                continue;
            }
            let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
            let value = line.get(colon + 1..).unwrap_or_default();
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &line[..colon] {
                b"data" => {
                    if self.data.len() + value.len() >= self.longest {
                        return Err(TooLong);
                    }
                    if std::mem::replace(&mut self.has_data, true) {
                        self.data.push(b'\n');
                    }
                    self.data.extend_from_slice(value);
                }
                b"event" => self.is_error = value == b"error",
                // Comments, and what clients that reconnect need.
                _ => {}
            }
        }
        Ok(None)
    }

    /// Where the next whole line lies in the buffer.
    fn line(&mut self) -> Result<Option<(usize, usize)>, TooLong> {
        if self.after_return && self.start < self.buffer.len() {
            self.after_return = false;
            self.start += usize::from(self.buffer[self.start] == b'\n');
        }
        let unread = &self.buffer[self.start..];
        let Some(length) = unread[self.scanned..].iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
            self.scanned = unread.len();
            return if self.scanned > self.longest { Err(TooLong) } else { Ok(None) };
        };
        let (mut from, to) = (self.start, self.start + self.scanned + length);
        self.after_return = self.buffer[to] == b'\r';
        (self.start, self.scanned) = (to + 1, 0);
        if !std::mem::replace(&mut self.begun, true) && self.buffer[from..to].starts_with("\u{feff}".as_bytes()) {
            from += '\u{feff}'.len_utf8();
        }
        Ok(Some((from, to)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used)]

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The events of a body that comes in these pieces.
    fn events(pieces: &[&[u8]]) -> Vec<(String, bool)> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        let mut take = |decoder: &mut Decoder| {
            while let Some(event) = decoder.next().expect("short lines") {
                events.push((String::from_utf8_lossy(event.data).into_owned(), event.is_error));
            }
        };
        for piece in pieces {
            decoder.push(piece);
            take(&mut decoder);
        }
        decoder.end();
        take(&mut decoder);
        events
    }

    fn data(text: &str) -> Vec<String> {
        events(&[text.as_bytes()]).into_iter().map(|(data, _)| data).collect()
    }

    #[test]
    fn events_are_told_apart_whatever_ends_their_lines() {
        assert_eq!(data("data: a\n\ndata:b\r\n\r\ndata:  c\r\rdata: d"), ["a", "b", " c", "d"]);
    }

    #[test]
    fn comments_empty_events_and_other_fields_are_nothing() {
        assert_eq!(data(": keepalive 3/9\n\n\n\nid: 7\nretry: 1\n\ndata\n\ndata: x\nevent: ping\n\n"), ["", "x"]);
    }

    #[test]
    fn the_data_lines_of_an_event_are_one_text() {
        assert_eq!(data("data: {\ndata: }\n\n"), ["{\n}"]);
    }

    #[test]
    fn a_mark_of_the_byte_order_is_no_part_of_the_first_line() {
        assert_eq!(data("\u{feff}data: a\n\n"), ["a"]);
    }

    #[test]
    fn an_event_may_call_itself_an_error() {
        let told = events(&[b"event: error\ndata: a\n\ndata: b\n\nevent: error\n\ndata: c\n\n"]);
        assert_eq!(told, [("a".into(), true), ("b".into(), false), ("c".into(), false)]);
    }

    #[test]
    fn what_has_no_end_is_refused() {
        let mut endless = Decoder::default();
        let piece = vec![b'x'; LONGEST / 4];
        let refused = (0..9).any(|_| {
            endless.push(&piece);
            endless.next().is_err()
        });
        assert!(refused && endless.buffer.len() <= LONGEST + piece.len());
        let mut many = Decoder::default();
        let line = format!("data: {}\n", "x".repeat(LONGEST / 4));
        let refused = (0..9).any(|_| {
            many.push(line.as_bytes());
            many.next().is_err()
        });
        assert!(refused && many.data.len() <= LONGEST);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_a_body_is_cut(
            lines in vec(prop_oneof![
                Just(String::new()),
                Just(": alive".to_owned()),
                Just("event: error".to_owned()),
                "data: ?[a-zä\u{1f600}{}:\"]{0,9}",
                "[a-z: ]{0,6}",
            ], 0..40),
            ends in vec(prop_oneof![Just("\n"), Just("\r\n"), Just("\r")], 40),
            cuts in vec(0_usize..400, 0..40),
        ) {
            let body: String = lines.iter().zip(ends).flat_map(|(line, end)| [line.as_str(), end]).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(body.len())).chain([0, body.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &body.as_bytes()[cut[0]..cut[1]]).collect();
            prop_assert_eq!(events(&pieces), events(&[body.as_bytes()]));
        }

        #[test]
        fn nothing_that_comes_is_too_odd(pieces in vec(vec(any::<u8>(), 0..60), 0..20)) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            events(&pieces);
        }
    }
}
