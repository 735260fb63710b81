//! Whole controllers and workers over real nats-servers that go away.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mlx_serving_router::config::{ClusterConfig, NatsMode, ServerUrls};
use mlx_serving_router::dispatch::{CallOptions, Controller, TokenStream};
use mlx_serving_router::error::ControllerErrorCode as Code;
use mlx_serving_router::transport::nats::NatsConnection;
use mlx_serving_router::wire::Phase;
use mlx_serving_router::worker::Worker;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::server::Server;
use super::{PATIENCE, finish, options, request};

fn config(servers: Vec<String>) -> ClusterConfig {
    let mut config = ClusterConfig::default();
    config.nats.mode = NatsMode::External;
    config.nats.server_url = ServerUrls::Many(servers);
    config
}

/// A worker that says a token every two milliseconds, two seconds long.
async fn talker(server: &Server) -> Worker {
    let worker = Worker::new(options("w", 32, 64), &config(vec![server.url()])).unwrap();
    worker.jobs().report(Phase::Ready, vec!["tiny".into()], Vec::new());
    worker.start(None).await.unwrap();
    let jobs = worker.jobs();
    tokio::spawn(async move {
        while let Some(job) = jobs.next().await {
            tokio::spawn(async move {
                for number in 0..1_000 {
                    job.token("x", &[number], None);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                job.done(finish(), None);
            });
        }
    });
    worker
}

/// A way to a server that forwards everything until it is told to swallow it. One connection.
async fn hole_before(server: &Server) -> (String, Arc<AtomicBool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let (swallows, to) = (Arc::<AtomicBool>::default(), server.url().replace("nats://", ""));
    let hole = swallows.clone();
    tokio::spawn(async move {
        let (near, far) = (listener.accept().await.unwrap().0, TcpStream::connect(to).await.unwrap());
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::join!(forward(near_in, far_out, &hole), forward(far_in, near_out, &hole));
    });
    (url, swallows)
}

async fn forward(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, swallows: &AtomicBool) {
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if !swallows.load(Ordering::SeqCst) && to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

async fn end(mut stream: TokenStream) -> Option<Code> {
    loop {
        match stream.next_batch().await {
            Ok(batch) if batch.is_empty() => return None,
            Ok(_) => {}
            Err(error) => return Some(error.code()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_break_with_our_own_connection_blame_no_worker() {
    let Some((staying, leaving)) = Server::start_two().await else { return };
    // The second name makes it wait for another server, which it knows by what the first one tells.
    let controller = Controller::new(config(vec![leaving.url(), "nats://127.0.0.1:1".into()]), None).unwrap();
    controller.start(None).await.unwrap();
    let worker = talker(&staying).await;
    tokio::time::timeout(PATIENCE, controller.wait_for_workers(1)).await.expect("it is seen").unwrap();
    let mut streams = Vec::new();
    for number in 0..8 {
        let request = request(&format!("r{number}"), true);
        streams.push(controller.streaming(request, CallOptions::default()).await.unwrap());
    }
    let reading: Vec<_> = streams.into_iter().map(|stream| tokio::spawn(end(stream))).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(leaving);
    for reading in reading {
        assert_eq!(reading.await.unwrap(), Some(Code::StreamInterrupted));
    }
    let breaker = &controller.breaker_stats()[0].1;
    assert_eq!((breaker.failure_count, breaker.window_failures, breaker.state.as_str()), (0, 0, "CLOSED"));
    controller.stop(Duration::ZERO).await;
    worker.stop(Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn case_27_a_link_that_swallows_everything_blames_no_worker() {
    let Some(server) = Server::start().await else { return };
    let (url, swallows) = hole_before(&server).await;
    let mut config = config(vec![url]);
    config.request_routing.retry.enabled = false;
    let controller = Controller::new(config, None).unwrap();
    controller.start(None).await.unwrap();
    let worker = talker(&server).await;
    tokio::time::timeout(PATIENCE, controller.wait_for_workers(1)).await.expect("it is seen").unwrap();
    swallows.store(true, Ordering::SeqCst);
    let names: Vec<_> = (0..8).map(|number| format!("r{number}")).collect();
    let calls = names.iter().map(|name| controller.buffered(request(name, false), CallOptions::default()));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap_err().code(), Code::WorkerTimeout);
    }
    let breaker = &controller.breaker_stats()[0].1;
    assert_eq!((breaker.failure_count, breaker.state.as_str()), (0, "CLOSED"));
    controller.stop(Duration::ZERO).await;
    worker.stop(Duration::ZERO).await;
}

#[tokio::test]
async fn a_server_that_does_not_answer_leaves_time_for_the_others() {
    let Some(server) = Server::start().await else { return };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut nats = config(vec![format!("nats://{}", silent.local_addr().unwrap()), server.url()]).nats;
    nats.connect_timeout_ms = 1_000;
    // Either may be tried first.
    for _ in 0..8 {
        NatsConnection::connect(&nats, "test").await.unwrap();
    }
}
