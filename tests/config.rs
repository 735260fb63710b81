//! The configuration through the public API: what is read, what is refused and where, what is shown.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use mlx_serving_router::config::{ApiKey, ClusterConfig, ConfigError, NatsMode, ServerUrls, Strategy, StreamFailover};
use serde_json::{Value, json};

const ALL: &str = include_str!("../examples/cluster.yaml");

fn yaml(text: &str) -> Result<ClusterConfig, ConfigError> {
    ClusterConfig::from_yaml(text, Some("cluster.yaml"))
}

fn refused(text: &str) -> String {
    yaml(text).expect_err(text).to_string()
}

fn environment(variables: &[(&str, &str)]) -> Result<ClusterConfig, ConfigError> {
    ClusterConfig::from_environment(variables.iter().copied())
}

// === what is read ===

#[test]
fn a_file_with_every_default_is_the_default() {
    assert_eq!(yaml(ALL).unwrap(), ClusterConfig::default());
}

#[test]
fn the_fixture_names_every_key() {
    let written = yaml_to_json(ALL);
    assert_eq!(written["cluster"], without_float_zeros(serde_json::to_value(ClusterConfig::default()).unwrap()));
}

#[test]
fn nothing_means_the_defaults() {
    for text in ["", "# only a comment\n", "{}", "cluster:\n", "cluster: {}", "nats:\nrequestRouting:\n  retry:\n"] {
        assert_eq!(yaml(text).unwrap(), ClusterConfig::default(), "{text:?}");
    }
}

#[test]
fn json_and_values_are_read_like_yaml() {
    let value = json!({"requestRouting": {"retry": {"maxRetries": 7}}, "nats": {"mode": "none"}});
    let indented = format!("{{\n\t\"cluster\":\t{value}\n}}\n");
    let read = yaml(&indented).unwrap();
    assert_eq!((read.request_routing.retry.max_retries, read.nats.mode), (7, NatsMode::None));
    assert_eq!(ClusterConfig::from_value(value.clone()).unwrap(), read);
    assert_eq!(ClusterConfig::from_value(json!({"cluster": value})).unwrap(), read);
}

#[test]
fn an_api_key_is_a_text_or_an_object_with_limits() {
    let text = "controller: {apiKeys: [plain, {key: limited, name: n, max_concurrent: 2, requestsPerMinute: 60}, {key: other}]}";
    let config = yaml(text).unwrap();
    let secrets: Vec<_> = config.controller.api_keys.iter().map(ApiKey::secret).collect();
    assert_eq!(secrets, ["plain", "limited", "other"]);
    let ApiKey::Limited(limited) = &config.controller.api_keys[1] else { panic!("{config:?}") };
    assert_eq!((limited.max_concurrent, limited.requests_per_minute), (Some(2), Some(60)));
    assert_eq!(ClusterConfig::from_value(serde_json::to_value(&config).unwrap()).unwrap(), config);
    let error = refused("controller: {apiKeys: [{key: a, maxConcurent: 2}]}");
    assert!(error.contains("did you mean maxConcurrent"), "{error}");
}

#[test]
fn keys_may_be_camel_case_or_snake_case_at_the_top_or_under_cluster() {
    let expected =
        yaml("requestRouting: {sessionTTL: 5, retry: {maxRetries: 7}}\nworkers: {static: [{workerId: a, url: 'http://a:1'}]}\n");
    let expected = expected.unwrap();
    assert_eq!((expected.request_routing.session_ttl, expected.request_routing.retry.max_retries), (5, 7));
    let snake =
        "request_routing: {session_ttl: 5, retry: {max_retries: 7}}\nworkers: {static: [{worker_id: a, url: 'http://a:1'}]}\n";
    assert_eq!(yaml(snake).unwrap(), expected);
    assert_eq!(yaml(&snake.replace("session_ttl", "sessionTtl")).unwrap(), expected);
    let indented: String = snake.lines().map(|line| format!("  {line}\n")).collect();
    assert_eq!(yaml(&format!("cluster:\n{indented}")).unwrap(), expected);
}

#[test]
fn every_key_has_a_snake_case_form() {
    fn snake(value: &Value) -> Value {
        let key = |key: &String| {
            let separated: String =
                key.chars().map(|c| if c.is_ascii_uppercase() { format!("_{c}") } else { c.into() }).collect();
            separated.replace("_T_T_L", "_ttl").to_ascii_lowercase()
        };
        match value {
            Value::Object(entries) => entries.iter().map(|(name, value)| (key(name), snake(value))).collect(),
            other => other.clone(),
        }
    }
    let snake = snake(&serde_json::to_value(ClusterConfig::default()).unwrap());
    assert_eq!(ClusterConfig::from_value(snake).unwrap(), ClusterConfig::default());
}

#[test]
fn a_server_url_may_be_a_list_and_a_strategy_have_another_name() {
    let read = yaml("nats: {serverUrl: [nats://a:4222, 'tls://b:4222']}\nloadBalancing: {strategy: smart}").unwrap();
    assert_eq!(read.nats.server_url, ServerUrls::Many(vec!["nats://a:4222".into(), "tls://b:4222".into()]));
    assert_eq!(read.load_balancing.strategy, Strategy::SkillsBased);
    assert_eq!(yaml("loadBalancing: {strategy: least_loaded}").unwrap().load_balancing.strategy, Strategy::LeastRequests);
    assert_eq!(yaml("requestRouting: {streamFailover: off}").unwrap().request_routing.stream_failover, StreamFailover::Off);
}

#[test]
fn anchors_and_merges_work() {
    let text = "nats: {tls: &t {caFile: ca}}\n";
    assert_eq!(yaml(text).unwrap().nats.tls.ca_file.as_deref(), Some("ca"));
    let text = "loadBalancing:\n  weights: {a: &w 2.5, b: *w}\n";
    assert_eq!(yaml(text).unwrap().load_balancing.weights["b"], 2.5);
}

// === what is refused, and where ===

#[test]
fn an_unknown_key_is_named_with_its_place_and_the_nearest_one() {
    let text = "cluster:\n  nats:\n    mode: none\n  requestRouting:\n    retry:\n      enabled: true\n      maxRetris: 3\n";
    let error = yaml(text).unwrap_err();
    assert_eq!((error.path.as_deref(), error.line, error.column), (Some("cluster.yaml"), Some(7), Some(7)));
    assert_eq!(error.key.as_deref(), Some("requestRouting.retry.maxRetris"));
    assert_eq!(error.to_string(), "cluster.yaml:7:7: requestRouting.retry.maxRetris: unknown key; did you mean maxRetries?");
    assert_eq!(
        refused("request_routing: {retry: {max_retris: 3}}"),
        "cluster.yaml:1:27: request_routing.retry.max_retris: unknown key; did you mean max_retries?"
    );
    assert_eq!(refused("logging: {colour: red}"), "cluster.yaml:1:11: logging.colour: unknown key; known are level, format");
    assert_eq!(refused("natz: {}"), "cluster.yaml:1:1: natz: unknown key; did you mean nats?");
}

#[test]
fn an_unknown_value_is_refused_with_the_nearest_one_or_all() {
    assert!(refused("loadBalancing: {strategy: leest_requests}").ends_with("did you mean least_requests?"));
    let told = refused("loadBalancing: {strategy: bogus}");
    for known in ["round_robin", "least_requests", "weighted_random", "skills_based", "peak_ewma", "prefix_aware"] {
        assert!(told.contains(known), "{told}");
    }
    let told = refused("requestRouting: {retry: {retryOnErrors: [FOO]}}");
    assert!(told.contains("WORKER_TIMEOUT, ") && told.contains("MODEL_LOAD_FAILED"), "{told}");
}

#[test]
fn a_wrong_type_says_what_was_expected_and_found() {
    for (text, expected) in [
        ("controller:\n  port: many\n", r#"cluster.yaml:2:9: controller.port: expected a whole number, found the text "many""#),
        ("controller: {port: 80.5}", "cluster.yaml:1:20: controller.port: expected a whole number, found 80.5"),
        ("controller: {port: 70000}", "cluster.yaml:1:20: controller.port: expected a whole number from 0 to 65535, found 70000"),
        ("controller: {port: -1}", "cluster.yaml:1:20: controller.port: expected a whole number from 0 to 65535, found -1"),
        ("controller: {port: null}", "cluster.yaml:1:20: controller.port: expected a whole number, found nothing"),
        ("requestRouting: {retry: 3}", "cluster.yaml:1:25: requestRouting.retry: expected keys and values, found 3"),
        (
            "requestRouting: {retry: {enabled: yes}}",
            r#"cluster.yaml:1:35: requestRouting.retry.enabled: expected true or false, found the text "yes""#,
        ),
        ("nats: {user: 7}", "cluster.yaml:1:14: nats.user: expected a text (in quotes), found 7"),
        (
            "nats: {serverUrl: {a: b}}",
            "cluster.yaml:1:19: nats.serverUrl: expected a URL or a list of URLs, found keys and values",
        ),
        ("workers: {static: [{workerId: a}]}", "cluster.yaml:1:20: workers.static[0]: url is required"),
        ("[1, 2]", "cluster.yaml:1:1: expected keys and values, found a list"),
        ("mode: 3", "cluster.yaml:1:7: mode: expected one of controller, worker, both, found 3"),
        ("mode: bot", r#"cluster.yaml:1:7: mode: unknown value "bot"; did you mean both?"#),
        (
            "requestRouting:\n  retry:\n    retryOnErrors:\n    - WORKER_TIMEOUT\n    - WORKER_UNAVALABLE\n",
            r#"cluster.yaml:5:7: requestRouting.retry.retryOnErrors[1]: unknown value "WORKER_UNAVALABLE"; did you mean WORKER_UNAVAILABLE?"#,
        ),
    ] {
        assert_eq!(refused(text), expected);
    }
}

#[test]
fn a_value_out_of_range_says_the_range() {
    for (text, expected) in [
        (
            "requestRouting:\n  retry:\n    maxRetries: 101\n",
            "cluster.yaml:3:17: requestRouting.retry.maxRetries: 101 is out of range; 0 to 100 is allowed",
        ),
        ("controller: {maxWorkers: 0}", "cluster.yaml:1:26: controller.maxWorkers: 0 is out of range; 1 or more is allowed"),
        (
            "request_routing: {session_ttl: 0}",
            "cluster.yaml:1:32: requestRouting.sessionTTL: 0 is out of range; 1 to 31536000000 is allowed",
        ),
        (
            "workers: {static: [{workerId: a, url: 'http://a:1', priority: 101}]}",
            "cluster.yaml:1:63: workers.static[0].priority: 101 is out of range; 0 to 100 is allowed",
        ),
        (
            "requestRouting: {circuitBreaker: {failureRatePercent: 101}}",
            "cluster.yaml:1:55: requestRouting.circuitBreaker.failureRatePercent: 101 is out of range; 1 to 100 is allowed",
        ),
        (
            "loadBalancing: {slowStartMs: 99999999999999}",
            "cluster.yaml:1:30: loadBalancing.slowStartMs: 99999999999999 is out of range; 0 to 31536000000 is allowed",
        ),
    ] {
        assert_eq!(refused(text), expected);
    }
}

#[test]
fn what_no_type_says_is_checked_too() {
    for (text, key) in [
        ("nats: {subjectPrefix: team-a}", "nats.subjectPrefix"),
        ("nats: {subjectPrefix: 'a..b.'}", "nats.subjectPrefix"),
        ("nats: {subjectPrefix: 'a.*.'}", "nats.subjectPrefix"),
        ("nats: {subjectPrefix: '.'}", "nats.subjectPrefix"),
        ("nats: {serverUrl: []}", "nats.serverUrl"),
        ("nats: {serverUrl: 'http://a:1'}", "nats.serverUrl"),
        ("nats: {serverUrl: [nats://a, 'b:4222']}", "nats.serverUrl"),
        ("nats: {user: u, password: p, credentialsFile: f}", "nats.credentialsFile"),
        ("nats: {password: p}", "nats.password"),
        ("nats: {tls: {certFile: f}}", "nats.tls.certFile"),
        ("nats: {tls: {keyFile: f}}", "nats.tls.keyFile"),
        ("controller: {apiKeys: ['']}", "controller.apiKeys"),
        ("controller: {apiKeys: [{key: ''}]}", "controller.apiKeys"),
        ("controller: {apiKeys: ['a ']}", "controller.apiKeys"),
        ("controller: {apiKeys: [a, {key: a}]}", "controller.apiKeys"),
        ("controller: {apiKeys: [{key: a, name: n}, {key: b, name: n}]}", "controller.apiKeys"),
        ("controller: {apiKeys: [{key: a, maxConcurrent: 0}]}", "controller.apiKeys"),
        ("controller: {apiKeys: [{key: a, requestsPerMinute: 0}]}", "controller.apiKeys"),
        ("controller: {cors: {allowOrigins: ['https://a/path']}}", "controller.cors.allowOrigins"),
        ("controller: {cors: {allowOrigins: [a]}}", "controller.cors.allowOrigins"),
        ("controller: {bindAddress: ''}", "controller.bindAddress"),
        ("workers: {static: [{workerId: a.b, url: 'http://a:1'}]}", "workers.static[0].workerId"),
        ("workers: {static: [{workerId: a, url: 'nats://a:1'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:1'}, {workerId: a, url: 'http://b:1'}]}", "workers.static"),
        ("workers: {static: [{workerId: a, url: 'http://u:p@a:1'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:1/#x'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:80800'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:808O/v1'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:+80'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://[::1]:0'}]}", "workers.static[0].url"),
        ("workers: {static: [{workerId: a, url: 'http://a:1', models: []}]}", "workers.static[0].models"),
        ("workers: {static: [{workerId: a, url: 'http://a:1', models: ['m=']}]}", "workers.static[0].models"),
        ("workers: {static: [{workerId: a, url: 'http://a:1', maxConcurrent: 0}]}", "workers.static[0].maxConcurrent"),
        ("workers: {static: [{workerId: a, url: 'http://a:1', apiKey: ''}]}", "workers.static[0].apiKey"),
        ("loadBalancing: {weights: {a: -1}}", "loadBalancing.weights"),
    ] {
        let error = yaml(text).expect_err(text);
        assert_eq!((error.key.as_deref(), error.line), (Some(key), Some(1)), "{text}: {error}");
    }
    for good in ["http://a", "http://a:65535/v1", "http://[::1]", "https://[::1]:8080/", "http://a/b:c"] {
        assert!(yaml(&format!("workers: {{static: [{{workerId: a, url: '{good}'}}]}}")).is_ok(), "{good}");
    }
    for good in ["team-a.", "a.b_2.", "''"] {
        assert!(yaml(&format!("nats: {{subjectPrefix: {good}}}")).is_ok(), "{good}");
    }
}

#[test]
fn what_is_built_in_the_program_can_be_checked() {
    let mut config = ClusterConfig::default();
    config.check().unwrap();
    config.load_balancing.weights.insert("a".into(), f64::NAN);
    assert_eq!(config.check().unwrap_err().key.as_deref(), Some("loadBalancing.weights"));
}

#[test]
fn broken_yaml_says_where() {
    for (text, line) in [
        ("nats:\n  mode: [none\n", 2),
        ("a: b: c\n", 1),
        ("mode: both\nmode: both\n", 2),
        ("---\nmode: both\n---\nmode: both\n", 4),
        ("a: *b\n", 1),
    ] {
        let error = yaml(text).expect_err(text);
        assert_eq!((error.line, error.path.as_deref()), (Some(line), Some("cluster.yaml")), "{text:?}: {error}");
        assert!(!error.message.contains("line"), "the place stands in front already: {error}");
        assert!(!error.message.contains("Options"), "no advice for programmers of the parser: {error}");
    }
    assert!(yaml(&"[".repeat(100_000)).is_err());
    assert!(yaml(&"{a: ".repeat(100_000)).is_err());
}

#[test]
fn a_key_given_in_both_styles_is_refused() {
    let error = yaml("requestRouting:\n  retry: {maxRetries: 1, max_retries: 2}\n").unwrap_err();
    assert_eq!((error.key.as_deref(), error.line), (Some("requestRouting.retry"), Some(2)));
}

#[test]
fn keys_beside_cluster_are_refused() {
    let error = yaml("cluster: {mode: both}\nnats: {mode: none}\n").unwrap_err();
    assert_eq!((error.key.as_deref(), error.line), (Some("nats"), Some(2)));
}

#[test]
fn a_value_has_a_key_path_and_no_place() {
    let error = ClusterConfig::from_value(json!({"nats": {"mode": "extern"}})).unwrap_err();
    assert_eq!((error.key.as_deref(), error.line, error.path), (Some("nats.mode"), None, None));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = ClusterConfig::load("no/such/file.yaml", [("", ""); 0]).unwrap_err();
    assert_eq!(error.path.as_deref(), Some("no/such/file.yaml"));
}

// === the environment ===

#[test]
fn the_environment_overrides_the_file() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/cluster.yaml");
    let variables = [
        ("MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIES", "3"),
        ("MLX_ROUTER__REQUEST_ROUTING__SESSION_TTL", "7"),
        ("MLX_ROUTER__NATS__SERVER_URL", "[nats://a:4222, nats://b:4222]"),
        ("MLX_ROUTER__LOAD_BALANCING__WEIGHTS", "{a: 2}"),
        ("MLX_ROUTER__LOGGING__LEVEL", "debug"),
        ("HOME", "/"),
        ("MLX_ROUTER_OTHER", "not ours"),
    ];
    let read = ClusterConfig::load(file, variables).unwrap();
    assert_eq!((read.request_routing.retry.max_retries, read.request_routing.session_ttl), (3, 7));
    assert_eq!(read.nats.server_url.as_slice(), ["nats://a:4222", "nats://b:4222"]);
    assert_eq!(read.load_balancing.weights["a"], 2.0);
    assert_eq!(read, environment(&variables).unwrap(), "the file holds defaults alone");
}

#[test]
fn a_single_key_wins_over_its_section() {
    let read = environment(&[
        ("MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIES", "3"),
        ("MLX_ROUTER__REQUEST_ROUTING__RETRY", "{maxRetries: 9, enabled: false}"),
    ]);
    let retry = read.unwrap().request_routing.retry;
    assert_eq!((retry.max_retries, retry.enabled), (3, false));
}

#[test]
fn a_text_in_the_environment_is_taken_as_it_stands() {
    for (given, expected) in [
        ("12345", Some("12345")),
        ("p#a: [ss", Some("p#a: [ss")),
        ("'1 2'", Some("1 2")),
        ("true", Some("true")),
        ("", None),
        ("null", None),
    ] {
        let read = environment(&[("MLX_ROUTER__NATS__USER", "me"), ("MLX_ROUTER__NATS__PASSWORD", given)]).unwrap();
        assert_eq!(read.nats.password.as_deref(), expected, "{given:?}");
    }
}

#[test]
fn a_bad_variable_is_named() {
    for (name, value, expected) in [
        (
            "MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIS",
            "3",
            "requestRouting.retry: unknown name; did you mean MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIES?",
        ),
        ("MLX_ROUTER__NATS__PORT__X", "3", "nats: unknown name"),
        ("MLX_ROUTER__nats__mode", "none", "unknown name; did you mean MLX_ROUTER__NATS?"),
        ("MLX_ROUTER__LOAD_BALANCING__WEIGHTS__A", "1", "loadBalancing.weights: nothing inside this key can be set alone"),
        ("MLX_ROUTER__CONTROLLER__PORT", "many", r#"controller.port: expected a whole number, found the text "many""#),
        (
            "MLX_ROUTER__REQUEST_ROUTING__RETRY__MAX_RETRIES",
            "101",
            "requestRouting.retry.maxRetries: 101 is out of range; 0 to 100 is allowed",
        ),
        (
            "MLX_ROUTER__REQUEST_ROUTING__RETRY",
            "{maxRetris: 1}",
            "requestRouting.retry.maxRetris: unknown key; did you mean maxRetries?",
        ),
    ] {
        let error = environment(&[(name, value)]).expect_err(name);
        assert_eq!((error.variable.as_deref(), error.line), (Some(name), None));
        let shown = error.to_string();
        assert!(shown.starts_with(&format!("environment variable {name}: {expected}")), "{shown}");
    }
}

// === what is shown ===

#[test]
fn secrets_are_never_shown() {
    let text = "
nats: {serverUrl: 'nats://token-SECRET@a:4222', user: me, password: SECRET}
controller: {apiKeys: [SECRET, {key: SECRET2, name: mine, maxConcurrent: 3}]}
workers: {static: [{workerId: a, url: 'http://a:1/', apiKey: SECRET}]}
";
    let config = yaml(text).unwrap();
    for shown in [format!("{config:?}"), format!("{config:#?}"), config.redacted().to_string()] {
        assert!(!shown.contains("SECRET"), "{shown}");
        assert!(shown.contains("***") && shown.contains("me"), "{shown}");
        assert!(shown.contains("mine") && shown.contains('3'), "{shown}");
    }
    for text in [
        "controller: {apiKeys: SECRET}",
        "controller: {apiKeys: [{SECRET: 1}]}",
        "controller: {apiKeys: [5333]}",
        "controller: {apiKeys: [{key: SECRET, name: [SECRET]}]}",
        "controller: {apiKeys: [{key: SECRET, maxConcurrent: SECRET}]}",
        "controller: {apiKeys: [SECRET, SECRET]}",
        "nats: {password: [SECRET]}",
        "nats: {password: 5333}",
        "nats: {serverUrl: 'ftp://SECRET@a:1'}",
        "nats: {user: a, password: SECRET, credentialsFile: f}",
        "nats:\n  password: SECRET\n  : [\n",
        "workers: {static: [{workerId: a, url: 'SECRET@http', apiKey: SECRET}]}",
        "workers: {static: [{workerId: a, url: 'http://u:SECRET@a:1', apiKey: SECRET}]}",
        "workers: {static: [{workerId: a, url: 'http://a:1/?key=SECRET'}]}",
    ] {
        let error = yaml(text).expect_err(text);
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("SECRET") && !shown.contains("5333"), "{shown}");
    }
}

// === the schema and the page ===

/// Every key of the schema, with the properties it has.
fn schema_keys(schema: &Value) -> Vec<(String, Value)> {
    let definitions = schema["$defs"].as_object().unwrap().values();
    let properties = definitions.filter_map(|definition| definition["properties"].as_object());
    properties.flatten().map(|(key, property)| (key.clone(), property.clone())).collect()
}

#[test]
fn the_schema_tells_descriptions_defaults_and_ranges() {
    let schema = ClusterConfig::schema();
    let retry = &schema["$defs"]["RetryConfig"];
    assert_eq!(retry["additionalProperties"], false);
    let key = &retry["properties"]["maxRetries"];
    assert_eq!((&key["default"], &key["minimum"], &key["maximum"]), (&json!(2), &json!(0), &json!(100)));
    assert_eq!(&retry["properties"]["max_retries"], key);
    for (key, property) in schema_keys(&schema) {
        assert!(property["description"].is_string(), "{key} has no description");
    }
    for name in ["least_requests", "least_loaded", "smart"] {
        let strategies = schema["$defs"]["Strategy"]["oneOf"].as_array().unwrap();
        assert!(strategies.iter().any(|strategy| strategy["const"] == name), "{name}");
    }
    let places = schema["anyOf"].as_array().unwrap();
    assert_eq!(places[0]["$ref"], "#/$defs/ClusterConfig");
    assert_eq!(places[1]["properties"]["cluster"], places[0]);
    for reference in references(&schema) {
        assert!(schema.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
}

fn references(value: &Value) -> Vec<String> {
    match value {
        Value::Object(entries) => entries
            .iter()
            .flat_map(|(key, value)| match value {
                Value::String(target) if key == "$ref" => vec![target.clone()],
                other => references(other),
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn the_page_names_every_key_and_its_default() {
    let page = include_str!("../docs/configuration.md");
    for (key, _) in schema_keys(&ClusterConfig::schema()) {
        let ways = ["`{}`", ".{}`", "`{}.", ".{}."].map(|way| way.replace("{}", &key));
        assert!(key.contains('_') || ways.iter().any(|way| page.contains(way)), "{key}");
    }
    let defaults = serde_json::to_value(ClusterConfig::default()).unwrap();
    for (path, value) in leaves("", &defaults) {
        let row =
            page.lines().find(|line| line.starts_with(&format!("| `{path}` |"))).unwrap_or_else(|| panic!("no row for {path}"));
        let shown = match &value {
            Value::String(text) if text.is_empty() => "`\"\"`".into(),
            Value::String(text) => format!("`{text}`"),
            Value::Array(items) if !items.is_empty() => {
                format!("`[{}]`", items.iter().map(|item| item.as_str().unwrap()).collect::<Vec<_>>().join(", "))
            }
            other => format!("`{other}`"),
        };
        assert!(row.contains(&format!("| {shown} |")), "{path} is {shown}: {row}");
    }
}

/// Every key that holds a value, as a dotted path.
fn leaves(path: &str, value: &Value) -> Vec<(String, Value)> {
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            let inside = |key: &String| if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            entries.iter().flat_map(|(key, value)| leaves(&inside(key), value)).collect()
        }
        other => vec![(path.to_owned(), without_float_zeros(other.clone()))],
    }
}

fn yaml_to_json(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap()
}

/// `50.0` as `50`, as a person writes it.
fn without_float_zeros(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() && number.as_f64().unwrap().fract() == 0.0 => {
            json!(number.as_f64().unwrap() as i64)
        }
        Value::Object(entries) => entries.into_iter().map(|(key, value)| (key, without_float_zeros(value))).collect(),
        Value::Array(items) => items.into_iter().map(without_float_zeros).collect(),
        other => other,
    }
}
