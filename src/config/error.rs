//! What is wrong with a configuration, and where.

use std::fmt;

/// The Jaro-Winkler likeness, from 0 to 1, from which on a name is offered in place of another.
const LIKENESS_MIN: f64 = 0.85;

/// A configuration that cannot be used. It names the first thing that is wrong, its place, and what would be right.
///
/// Secrets are never part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigError {
    /// What is wrong and what would be right.
    pub message: String,
    /// The file.
    pub path: Option<String>,
    /// The environment variable, where one is to blame.
    pub variable: Option<String>,
    /// The line, from 1.
    pub line: Option<u32>,
    /// The column, from 1, in characters.
    pub column: Option<u32>,
    /// The keys that lead to it, as they were written: `requestRouting.retry.maxRetries`, `workers.static[0].url`.
    pub key: Option<String>,
}

// === impl ConfigError ===

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.variable, &self.path, self.line, self.column) {
            (Some(variable), ..) => write!(f, "environment variable {variable}: ")?,
            (None, Some(path), Some(line), Some(column)) => write!(f, "{path}:{line}:{column}: ")?,
            (None, Some(path), ..) => write!(f, "{path}: ")?,
            (None, None, Some(line), Some(column)) => write!(f, "line {line}, column {column}: ")?,
            (None, None, ..) => {}
        }
        if let Some(key) = &self.key {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {}

/// `; did you mean …?` with the candidate nearest to what was written, or `; … are known` where none is near.
///
/// Candidates in the style of what was written (camelCase or snake_case) come before the others. `prefix` is shown in front
/// of each.
pub(super) fn did_you_mean<'a>(prefix: &str, written: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    let snake_written = snake(written);
    let one_word = |candidate: &str| candidate.bytes().all(|byte| byte.is_ascii_lowercase());
    let styled = |candidate: &&str| candidate.contains('_') == written.contains('_') || one_word(candidate);
    let (same, other): (Vec<&str>, Vec<&str>) = candidates.into_iter().partition(styled);
    match nearest(&snake_written, same.iter().chain(&other)) {
        Some(candidate) => format!("; did you mean {prefix}{candidate}?"),
        None if same.is_empty() => String::new(),
        None => format!("; known are {}", same.iter().map(|key| format!("{prefix}{key}")).collect::<Vec<_>>().join(", ")),
    }
}

/// As [`did_you_mean`], for values, which are written in one way alone.
pub(super) fn did_you_mean_value(written: &str, candidates: &[&str]) -> String {
    match nearest(&snake(written), candidates) {
        Some(candidate) => format!("; did you mean {candidate}?"),
        None => format!("; known are {}", candidates.join(", ")),
    }
}

fn nearest<'a>(snake_written: &str, candidates: impl IntoIterator<Item = &'a &'a str>) -> Option<&'a str> {
    let likeness = |candidate: &str| strsim::jaro_winkler(snake_written, &snake(candidate));
    let alike = candidates.into_iter().map(|candidate| (likeness(candidate), *candidate));
    let (_, nearest) =
        alike.filter(|(likeness, _)| *likeness >= LIKENESS_MIN).reduce(|best, next| if next.0 > best.0 { next } else { best })?;
    Some(nearest)
}

/// A key in snake_case, whichever way it was written: `sessionTTL` is `session_ttl`.
pub(super) fn snake(key: &str) -> String {
    let mut snake = String::with_capacity(key.len() + 4);
    let mut after_lower = false;
    for letter in key.chars() {
        if letter.is_ascii_uppercase() && after_lower {
            snake.push('_');
        }
        after_lower = letter.is_ascii_lowercase() || letter.is_ascii_digit();
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_snake_case_form() {
        for (written, expected) in
            [("sessionTTL", "session_ttl"), ("sessionTtl", "session_ttl"), ("retryOnErrors", "retry_on_errors"), ("nats", "nats")]
        {
            assert_eq!(snake(written), expected);
            assert_eq!(snake(expected), expected);
        }
    }

    #[test]
    fn suggestions_keep_the_style_of_what_was_written() {
        let known = ["maxRetries", "max_retries", "enabled"];
        assert_eq!(did_you_mean("", "maxRetris", known), "; did you mean maxRetries?");
        assert_eq!(did_you_mean("", "max_retris", known), "; did you mean max_retries?");
        assert_eq!(did_you_mean("", "MaxRetries", known), "; did you mean maxRetries?");
        assert_eq!(did_you_mean("", "enable", known), "; did you mean enabled?");
        assert_eq!(did_you_mean("A__", "retrys", ["retry", "timeout"]), "; did you mean A__retry?");
        assert_eq!(did_you_mean("", "colour", known), "; known are maxRetries, enabled");
    }
}
