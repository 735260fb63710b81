//! A server that does as it is told, to the byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What a server does with a request for an answer, one after the other; at the end it closes the connection.
#[derive(Clone, Debug)]
pub enum Act {
    Write(Vec<u8>),
    /// Writes it again and again, as long as anybody reads.
    Flood(Vec<u8>),
    /// Nothing more, until the other side is gone.
    Stall,
    /// Goes on when it is told to.
    Wait,
    /// Goes on after so long.
    Pause(Duration),
    /// The connection breaks without an end.
    Reset,
    /// Waits for the next request on this connection.
    Keep,
    /// Waits for it, and closes the connection in place of an answer.
    Hear,
}

/// What a client asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    /// In lower case, one header a line.
    pub head: String,
    pub body: Value,
}

/// What it answers to those who look at it: a status and a body for `/health` and `/v1/models`; none: nothing at all.
#[derive(Clone, Debug)]
pub struct Looks {
    pub health: Option<(u16, String)>,
    pub models: Option<(u16, String)>,
    /// What it calls itself.
    pub name: Option<String>,
}

#[derive(Debug)]
struct Shared {
    script: Mutex<Vec<Act>>,
    looks: Mutex<Looks>,
    asked: watch::Sender<Vec<Asked>>,
    /// Connections that were taken for answers.
    connections: watch::Sender<usize>,
    /// Requests whose client left before the end.
    left: watch::Sender<usize>,
    goes_on: watch::Sender<usize>,
}

pub struct Server {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

impl Server {
    /// A server with a healthy look that serves `m`.
    pub async fn start(script: &[Act]) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), script).await
    }

    pub async fn start_at(address: SocketAddr, script: &[Act]) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let models = json!({"object": "list", "data": [{"id": "m", "object": "model"}]}).to_string();
        let shared = Arc::new(Shared {
            script: Mutex::new(script.to_vec()),
            looks: Mutex::new(Looks { health: Some((200, "{}".into())), models: Some((200, models)), name: None }),
            asked: watch::Sender::default(),
            connections: watch::Sender::default(),
            left: watch::Sender::default(),
            goes_on: watch::Sender::default(),
        });
        let listening = tokio::spawn(listen(listener, shared.clone()));
        Self { address, shared, listening: Some(listening) }
    }

    pub fn now_does(&self, script: &[Act]) {
        *self.shared.script.lock() = script.to_vec();
    }

    pub fn now_looks(&self, change: impl FnOnce(&mut Looks)) {
        change(&mut self.shared.looks.lock());
    }

    /// One request that waits goes on.
    pub fn go_on(&self) {
        self.shared.goes_on.send_modify(|count| *count += 1);
    }

    /// Requests for answers.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.borrow().clone()
    }

    pub fn connections(&self) -> usize {
        *self.shared.connections.borrow()
    }

    /// Returns when so many requests for answers have come.
    pub async fn was_asked(&self, count: usize) {
        self.shared.asked.subscribe().wait_for(|asked| asked.len() >= count).await.unwrap();
    }

    /// Returns when so many clients have left.
    pub async fn was_left(&self, count: usize) {
        self.shared.left.subscribe().wait_for(|left| *left >= count).await.unwrap();
    }

    /// Ends it with all its connections: nobody listens there any more.
    pub async fn stop(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
            let _ = listening.await;
        }
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        // Or pieces wait for each other, as nothing here is meant to.
        stream.set_nodelay(true).unwrap();
        connections.spawn(serve(stream, shared.clone()));
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    let mut answers = 0;
    while let Some(asked) = read(&mut stream, &mut buffer).await {
        let looks = shared.looks.lock().clone();
        let look = match asked.path.as_str() {
            "/health" => looks.health,
            "/v1/models" => looks.models,
            _ => {
                answers += 1;
                if answers == 1 {
                    shared.connections.send_modify(|count| *count += 1);
                }
                shared.asked.send_modify(|list| list.push(asked));
                let script = shared.script.lock().clone();
                if perform(&mut stream, script, &shared).await { continue } else { return }
            }
        };
        let Some((status, body)) = look else {
            gone(&mut stream).await;
            return;
        };
        let name = looks.name.map(|name| format!("server: {name}\r\n")).unwrap_or_default();
        let answer = format!("HTTP/1.1 {status} as told\r\n{name}content-length: {}\r\n\r\n{body}", body.len());
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Whether the connection is kept.
async fn perform(stream: &mut TcpStream, script: Vec<Act>, shared: &Shared) -> bool {
    let mut turns = shared.goes_on.subscribe();
    for act in script {
        let left = match act {
            Act::Write(bytes) => stream.write_all(&bytes).await.is_err(),
            Act::Flood(bytes) => {
                while stream.write_all(&bytes).await.is_ok() {}
                true
            }
            Act::Stall => {
                gone(stream).await;
                true
            }
            Act::Wait => tokio::select! {
                turn = turns.wait_for(|count| *count > 0) => {
                    turn.unwrap();
                    false
                }
                () = gone(stream) => true,
            },
            Act::Pause(span) => {
                tokio::time::sleep(span).await;
                false
            }
            Act::Reset => {
                stream.set_zero_linger().unwrap();
                return false;
            }
            Act::Keep => return true,
            Act::Hear => {
                read(stream, &mut Vec::new()).await;
                return false;
            }
        };
        if left {
            shared.left.send_modify(|count| *count += 1);
            return false;
        }
    }
    false
}

/// Returns when the other side has closed the connection.
async fn gone(stream: &mut TcpStream) {
    let mut bytes = [0; 1024];
    while stream.read(&mut bytes).await.is_ok_and(|count| count > 0) {}
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Asked> {
    loop {
        let end = buffer.windows(4).position(|window| window == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            if buffer.len() >= end + 4 + length {
                let path = String::from_utf8_lossy(&buffer[..end]).split(' ').nth(1)?.to_owned();
                let body = serde_json::from_slice(&buffer[end + 4..end + 4 + length]).unwrap_or_default();
                buffer.drain(..end + 4 + length);
                return Some(Asked { path, head, body });
            }
        }
        let mut bytes = [0; 4096];
        match stream.read(&mut bytes).await {
            Ok(count) if count > 0 => buffer.extend_from_slice(&bytes[..count]),
            _ => return None,
        }
    }
}

// === what servers write ===

/// The head of a stream whose end is that of its connection.
pub fn head() -> Act {
    write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
}

/// The head of a stream in chunks.
pub fn chunked_head() -> Act {
    write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
}

pub fn write(text: &str) -> Act {
    Act::Write(text.as_bytes().to_vec())
}

/// A chunk of a body in chunks; an empty one is its end.
pub fn chunk(text: &str) -> Act {
    write(&format!("{:x}\r\n{text}\r\n", text.len()))
}

pub fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

pub fn delta(text: &str) -> String {
    event(&json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}))
}

pub fn token(text: &str) -> Act {
    write(&delta(text))
}

pub fn finish() -> String {
    event(&json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
}

pub fn usage(prompt: u64, completion: u64) -> String {
    event(&json!({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}))
}

pub const DONE: &str = "data: [DONE]\n\n";

/// A whole good answer on a connection that stays.
pub fn good(texts: &[&str]) -> Vec<Act> {
    let tokens = texts.iter().map(|text| chunk(&delta(text)));
    let end = [chunk(&finish()), chunk(&usage(3, texts.len() as u64)), chunk(DONE), chunk(""), Act::Keep];
    [chunked_head()].into_iter().chain(tokens).chain(end).collect()
}

/// A refusal on a connection that stays.
pub fn refusal(status: u16, headers: &str, body: &str) -> Vec<Act> {
    vec![write(&format!("HTTP/1.1 {status} No\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len())), Act::Keep]
}
