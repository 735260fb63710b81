//! Rules for single values and pairs of them that a type or a range cannot say. Messages never hold a secret.

use std::collections::{BTreeMap, BTreeSet};

use garde::{Error, Result};

use super::{ApiKey, ServerUrls, StaticWorker, redact};
use crate::wire::WorkerId;

/// The longest span of time that can be set, in milliseconds: a year. It keeps every sum of spans far from overflow.
pub(super) const SPAN_MAX_MS: u64 = 365 * 24 * 60 * 60 * 1_000;

fn refuse<T>(message: impl std::fmt::Display) -> std::result::Result<T, Error> {
    Err(Error::new(message))
}

/// Something is there.
pub(super) fn not_empty<C>(value: &str, _: &C) -> Result {
    if value.is_empty() { refuse("is empty; leave the key out or give a value") } else { Ok(()) }
}

/// Keys that tell callers apart: none empty (it would let everybody in), none twice, no name twice, no limit of nothing.
pub(super) fn api_keys<C>(keys: &[ApiKey], context: &C) -> Result {
    let (mut secrets, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (index, key) in keys.iter().enumerate() {
        not_empty(key.secret(), context)?;
        if key.secret() != key.secret().trim() || key.secret().chars().any(char::is_control) {
            return refuse(format_args!(
                "entry {index} has a key with blanks around it or a line break, which no header can carry"
            ));
        }
        if !secrets.insert(key.secret()) {
            return refuse(format_args!("entry {index} has a key that stands there already"));
        }
        let ApiKey::Limited(limited) = key else { continue };
        if let Some(name) = &limited.name {
            if name.is_empty() || name.chars().any(char::is_control) {
                return refuse(format_args!("entry {index}: name is empty or has unprintable characters"));
            }
            if !names.insert(name) {
                return refuse(format_args!("two keys are named {name:?}"));
            }
        }
        for (field, limit) in [("maxConcurrent", limited.max_concurrent), ("requestsPerMinute", limited.requests_per_minute)] {
            if limit == Some(0) {
                return refuse(format_args!("entry {index}: {field} is 0; 1 or more is allowed, or null for no limit"));
            }
        }
    }
    Ok(())
}

/// Origins as browsers send them, or `*`.
pub(super) fn origins<C>(origins: &[String], _: &C) -> Result {
    let is_origin = |origin: &str| match origin.split_once("://") {
        Some(("http" | "https", host)) => !host.is_empty() && !host.contains(|c: char| c == '/' || c == '@' || c.is_whitespace()),
        _ => origin == "*",
    };
    match origins.iter().find(|origin| !is_origin(origin)) {
        Some(wrong) => refuse(format_args!(
            "{:?} is no origin; expected http://host:port or https://host, without a path, or \"*\"",
            redact::url(wrong)
        )),
        None => Ok(()),
    }
}

/// URLs of NATS servers, one at least.
pub(super) fn server_urls<C>(urls: &ServerUrls, _: &C) -> Result {
    if urls.as_slice().is_empty() {
        return refuse("is an empty list; give at least one URL");
    }
    urls.as_slice().iter().try_for_each(|url| with_scheme(url, &["nats", "tls", "ws", "wss"]))
}

/// The URL of a server that speaks the OpenAI API.
pub(super) fn http_url<C>(url: &str, _: &C) -> Result {
    with_scheme(url, &["http", "https"])?;
    match url.find(['@', '?', '#']) {
        Some(_) => refuse(format_args!("{:?} has more than an address; a key belongs into apiKey", redact::url(url))),
        None => with_port(url),
    }
}

/// Where a port is said it is one: an address without would be asked at that of its scheme.
fn with_port(url: &str) -> Result {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest.split('/').next().unwrap_or(rest));
    // An IPv6 address has colons of its own, within brackets.
    let after_host = authority.rsplit_once(']').map_or(authority, |(_, after)| after);
    match after_host.split_once(':') {
        Some((_, port)) if !port.bytes().all(|byte| byte.is_ascii_digit()) || !port.parse::<u16>().is_ok_and(|port| port > 0) => {
            refuse(format_args!("{:?} has the port {port:?}; expected a number from 1 to 65535", redact::url(url)))
        }
        _ => Ok(()),
    }
}

/// Models of a server, at least one, each a name or `name=server's name`.
pub(super) fn served_models<C>(models: &[String], _: &C) -> Result {
    let names = |model: &String| model.split_once('=').map_or_else(|| vec![model.clone()], |(a, b)| vec![a.into(), b.into()]);
    match models.iter().find(|model| names(model).iter().any(String::is_empty)) {
        _ if models.is_empty() => refuse("is an empty list; leave the key out to have the server asked"),
        Some(model) => refuse(format_args!("{model:?} has an empty name; expected \"name\" or \"name=server's name\"")),
        None => Ok(()),
    }
}

fn with_scheme(url: &str, allowed: &[&str]) -> Result {
    match url.split_once("://") {
        Some((scheme, rest)) if allowed.contains(&scheme) && !rest.is_empty() && !rest.contains(char::is_whitespace) => Ok(()),
        _ => {
            let schemes: Vec<String> = allowed.iter().map(|scheme| format!("{scheme}://host:port")).collect();
            refuse(format_args!("{:?} is no URL for this; expected {}", redact::url(url), schemes.join(" or ")))
        }
    }
}

/// Empty, or tokens that a subject can begin with, each with its dot.
pub(super) fn subject_prefix<C>(prefix: &str, _: &C) -> Result {
    let token = |token: &str| !token.is_empty() && token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    match prefix.strip_suffix('.') {
        None if prefix.is_empty() => Ok(()),
        Some(tokens) if tokens.split('.').all(token) => Ok(()),
        _ => refuse(format_args!(
            "{prefix:?} is no prefix of subjects; expected letters, digits, '-' and '_' with a dot at the end, such as \"team-a.\""
        )),
    }
}

/// One way to say who we are.
pub(super) fn one_identity(user: Option<&str>, password: Option<&str>) -> impl FnOnce(&Option<String>, &()) -> Result {
    let named = user.is_some() || password.is_some();
    move |credentials, ()| {
        if named && credentials.is_some() { refuse("stands beside user or password; give one or the other") } else { Ok(()) }
    }
}

/// A password needs its user.
pub(super) fn with_user(user: Option<&str>) -> impl FnOnce(&Option<String>, &()) -> Result {
    let alone = user.is_none();
    move |password, ()| if alone && password.is_some() { refuse("needs user beside it") } else { Ok(()) }
}

/// A certificate and its key come together.
pub(super) fn together(other: &'static str, present: bool) -> impl FnOnce(&Option<String>, &()) -> Result {
    move |file, ()| if file.is_some() && !present { refuse(format_args!("needs {other} beside it")) } else { Ok(()) }
}

/// A name that can be part of a subject.
pub(super) fn worker_id<C>(value: &str, _: &C) -> Result {
    WorkerId::new(value).map(drop).map_err(Error::new)
}

/// No two workers share a name.
pub(super) fn distinct_workers<C>(workers: &[StaticWorker], _: &C) -> Result {
    let mut seen = BTreeSet::new();
    match workers.iter().find(|worker| !seen.insert(&worker.worker_id)) {
        Some(twice) => refuse(format_args!("two workers are named {:?}", twice.worker_id)),
        None => Ok(()),
    }
}

/// Weights that a share can be made of.
pub(super) fn weights<C>(weights: &BTreeMap<String, f64>, _: &C) -> Result {
    match weights.iter().find(|(_, weight)| !weight.is_finite() || **weight < 0.0) {
        Some((worker, weight)) => refuse(format_args!("{worker}: {weight} is out of range; 0 or more is allowed")),
        None => Ok(()),
    }
}
