//! HTTP/2 by hyper, served and called directly: with TLS between nodes and for clients, without it to engines.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, oneshot},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt as _};

use crate::{
    CallInfo, Lease, Limits, Progress, TransportError,
    lease::Revocable,
    unread::{Unread, Watch, Watched},
};

/// An idle outgoing connection is looked at this often.
const IDLE_CHECK: Duration = Duration::from_secs(1);

/// How often a new outgoing connection is looked at until the server's SETTINGS have come.
const SETTINGS_CHECK: Duration = Duration::from_millis(1);

/// Runs what hyper spawns as tasks somebody awaits.
#[derive(Clone, Debug)]
struct Tracked(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// What ends a connection that serves.
#[derive(Debug)]
pub(crate) struct Until {
    pub(crate) age: Duration,
    pub(crate) drain: CancellationToken,
    pub(crate) lease: Lease,
}

impl Until {
    /// Resolves when it should take no new call.
    async fn over(&self) {
        let over = async {
            tokio::select! {
                () = self.drain.cancelled() => {}
                () = self.lease.over() => {}
            }
        };
        // The only outcome of either is to drain.
        drop(tokio::time::timeout(self.age, over).await);
    }
}

/// Serves one connection until it ends, or until it should take no new call and then the last one in progress.
pub(crate) async fn serve<I, S>(
    io: I,
    limits: &Limits,
    until: Until,
    info: CallInfo,
    service: S,
    tasks: TaskTracker,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let unread = Arc::new(Unread::new(limits));
    let watching = unread.clone();
    let handler = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let mut request = request.map(|body| Incoming::body(body, &watching, ()));
        request.extensions_mut().insert(info.clone());
        service.clone().oneshot(request)
    });
    let mut builder = hyper::server::conn::http2::Builder::new(Tracked(tasks));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.h2_streams)
        .max_pending_accept_reset_streams(limits.h2_pending_resets)
        .initial_stream_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.connection_window_bytes)
        .max_send_buf_size(limits.stream_window_bytes as usize)
        .max_header_list_size(limits.header_section_bytes)
        .keep_alive_interval(limits.idle_timeout / 2)
        .keep_alive_timeout(limits.idle_timeout / 2);
    let connection = builder.serve_connection(TokioIo::new(io), handler);
    tokio::pin!(connection);
    let serving = async {
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = until.over() => {}
        }
        connection.as_mut().graceful_shutdown();
        connection.await
    };
    let ended = tokio::select! {
        ended = serving => ended,
        never = sweep(&unread) => match never {},
        // The other end sees the connection break off.
        () = until.lease.withdrawn() => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP/2 connection broke off");
    }
}

/// Gives up calls nobody reads when they hold what the other calls need.
async fn sweep(unread: &Unread) -> Infallible {
    loop {
        tokio::time::sleep(unread.interval()).await;
        unread.sweep(base::clock::now());
    }
}

/// One HTTP/2 connection to a server, cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    sender: SendRequest<Upload>,
    in_flight: Arc<AtomicUsize>,
    streams: Arc<AtomicUsize>,
    unread: Arc<Unread>,
    closed: CancellationToken,
    scheme: &'static str,
    lease: Lease,
}

impl Client {
    /// Speaks HTTP/2 on `io`; the connection runs as one of `tasks` and closes itself when idle.
    pub(crate) async fn handshake<I>(
        io: I,
        scheme: &'static str,
        limits: &Limits,
        tasks: &TaskTracker,
        lease: Lease,
    ) -> Result<Self, TransportError>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = hyper::client::conn::http2::Builder::new(Tracked(tasks.clone()));
        builder
            .timer(TokioTimer::new())
            // None until the server's SETTINGS say how many: what hyper assumes until then would be queued without a bound.
            .initial_max_send_streams(0)
            .initial_stream_window_size(limits.stream_window_bytes)
            .initial_connection_window_size(limits.connection_window_bytes)
            .max_send_buf_size(limits.stream_window_bytes as usize)
            .max_header_list_size(limits.header_section_bytes);
        if let Some(silence) = limits.silence {
            builder.keep_alive_interval(limits.ping_interval).keep_alive_timeout(silence);
        }
        let (sender, mut connection) = builder
            .handshake(TokioIo::new(Revocable::new(io, &lease)))
            .await
            .map_err(|error| TransportError::from_hyper(&error))?;
        let client = Self {
            sender,
            in_flight: Arc::default(),
            streams: Arc::new(AtomicUsize::new(connection.current_max_send_streams())),
            unread: Arc::new(Unread::new(limits)),
            closed: CancellationToken::new(),
            scheme,
            lease,
        };
        let (in_flight, streams) = (client.in_flight.clone(), client.streams.clone());
        let (unread, closed) = (client.unread.clone(), client.closed.clone());
        let idle_timeout = limits.idle_timeout;
        let greeted = Arc::new(Notify::new());
        let greeting = greeted.clone();
        tasks.spawn(async move {
            // hyper does not wake us when SETTINGS come: until the first have, we look.
            let mut look = tokio::time::interval(SETTINGS_CHECK);
            let run = std::future::poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                let allowed = connection.current_max_send_streams();
                if streams.swap(allowed, Ordering::Relaxed) == 0 && allowed > 0 {
                    greeting.notify_one();
                }
                while allowed == 0 && ended.is_pending() && look.poll_tick(cx).is_ready() {}
                ended
            });
            tokio::select! {
                ended = run => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "an HTTP/2 connection broke off");
                    }
                }
                () = idle(&in_flight, idle_timeout) => {}
                never = sweep(&unread) => match never {},
                () = closed.cancelled() => {}
            }
            closed.cancel();
        });
        let settled = async {
            tokio::select! {
                () = greeted.notified() => Ok(client.clone()),
                () = client.closed.cancelled() => {
                    Err(TransportError::Closed("the server closed the new connection".into()))
                }
            }
        };
        tokio::time::timeout(limits.handshake_timeout, settled).await.unwrap_or_else(|_| {
            client.close();
            Err(TransportError::Closed("the server sent no HTTP/2 SETTINGS in time".into()))
        })
    }

    /// Whether new calls may be made on it.
    pub(crate) fn is_usable(&self, now: Instant) -> bool {
        !self.closed.is_cancelled() && !self.sender.is_closed() && !self.lease.is_over(now)
    }

    /// Whether another connection should take its place.
    pub(crate) fn is_old(&self, now: Instant) -> bool {
        self.lease.is_old(now)
    }

    /// Calls in progress.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Calls the server lets us have open at once.
    pub(crate) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Closes the connection; calls in progress fail.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Takes a place for a call; `None`: the server lets no more be open at once. hyper would queue without a bound.
    pub(crate) fn place(&self) -> Option<Place> {
        let streams = self.streams();
        let take = |count: usize| (count < streams).then_some(count + 1);
        self.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        Some(Place { client: self.clone(), in_flight: Counted(self.in_flight.clone()) })
    }
}

/// A place for one call on a connection.
#[derive(Debug)]
pub(crate) struct Place {
    client: Client,
    in_flight: Counted,
}

impl Place {
    /// Makes the call. Dropping the future, or the body of the response, cancels it at the server.
    pub(crate) async fn call(self, request: Request<Body>) -> Result<Response<Body>, CallError> {
        let Self { client, in_flight } = self;
        let (mut head, body) = request.into_parts();
        if let Some(progress) = head.extensions.get::<Progress>() {
            progress.mute();
        }
        head.version = http::Version::HTTP_2;
        let mut uri = std::mem::take(&mut head.uri).into_parts();
        uri.scheme = client.scheme.parse().ok();
        head.uri = http::Uri::from_parts(uri).map_err(|_| {
            CallError::Failed(TransportError::Malformed("a request without authority or path"))
        })?;
        // While this side of the channel lives, somebody wants the reply.
        let (wanted, unwanted) = oneshot::channel();
        let request = Request::from_parts(head, Upload { body, unwanted: Some(unwanted) });
        let response =
            client.sender.clone().try_send_request(request).await.map_err(|mut error| {
                let cause = TransportError::from_hyper(error.error());
                match error.take_message() {
                    Some(request) => CallError::Unsent(Box::new(request.map(|upload| upload.body))),
                    None => CallError::Failed(cause),
                }
            })?;
        Ok(response.map(|body| Incoming::body(body, &client.unread, (in_flight, wanted))))
    }
}

/// Why a call came to nothing.
#[derive(Debug)]
pub(crate) enum CallError {
    /// The connection closed before anything was sent: the request comes back, to be sent elsewhere.
    Unsent(Box<Request<Body>>),
    Failed(TransportError),
}

/// Resolves when nothing was in flight for `timeout`.
async fn idle(in_flight: &AtomicUsize, timeout: Duration) {
    let mut idle_for = Duration::ZERO;
    while idle_for < timeout {
        tokio::time::sleep(IDLE_CHECK.min(timeout)).await;
        let is_idle = in_flight.load(Ordering::Relaxed) == 0;
        idle_for = if is_idle { idle_for + IDLE_CHECK } else { Duration::ZERO };
    }
}

#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request body that breaks off with CANCEL when nobody wants the reply any more. hyper keeps sending a body whose
/// response was dropped, and the server would never learn of the cancellation.
#[derive(Debug)]
struct Upload {
    body: Body,
    unwanted: Option<oneshot::Receiver<Infallible>>,
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(unwanted) = &mut self.unwanted
            && Pin::new(unwanted).poll(cx).is_ready()
        {
            self.unwanted = None;
            return Poll::Ready(Some(Err(TransportError::cancelled().into())));
        }
        poll_filled(&mut self.body, cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The next frame that is not empty. An empty DATA frame is how some clients end a stream; passed on it would be one in
/// mid-stream, and a server closes a connection that brings a hundred of those ("too_many_data_frames").
fn poll_filled<B: http_body::Body<Data = Bytes> + Unpin>(
    body: &mut B,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
    loop {
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(cx));
        let is_empty =
            matches!(&frame, Some(Ok(frame)) if frame.data_ref().is_some_and(Bytes::is_empty));
        if !is_empty {
            return Poll::Ready(frame);
        }
    }
}

/// A body from hyper, its errors in our words; `held` lives as long as it does.
#[derive(Debug)]
struct Incoming<H> {
    /// Shared with the connection's watch over unread streams.
    stream: Arc<Mutex<Stream>>,
    watch: Watch,
    _held: H,
}

#[derive(Debug)]
struct Stream {
    /// What hyper has, or why it was given up.
    body: Result<hyper::body::Incoming, TransportError>,
    /// What was taken off to find out whether there is anything.
    taken: Option<Frame<Bytes>>,
}

impl Stream {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, TransportError>>> {
        if let Some(frame) = self.taken.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        match &mut self.body {
            Ok(body) => poll_filled(body, cx).map_err(|error| TransportError::from_hyper(&error)),
            Err(error) => Poll::Ready(Some(Err(error.clone()))),
        }
    }
}

impl Watched for Stream {
    fn has_unread(&mut self) -> bool {
        if self.taken.is_none() {
            match self.poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Some(Ok(frame))) => self.taken = Some(frame),
                // hyper says it once, and a clean end ever after.
                Poll::Ready(Some(Err(error))) => self.body = Err(error),
                Poll::Ready(None) | Poll::Pending => {}
            }
        }
        self.taken.is_some()
    }

    fn give_up(&mut self, error: TransportError) {
        self.taken = None;
        // Dropping the body gives its bytes back to the connection.
        self.body = Err(error);
    }
}

impl<H: Send + Unpin + 'static> Incoming<H> {
    fn body(body: hyper::body::Incoming, unread: &Unread, held: H) -> Body {
        if http_body::Body::is_end_stream(&body) {
            return Body::empty();
        }
        let stream = Arc::new(Mutex::new(Stream { body: Ok(body), taken: None }));
        let watch = unread.watch(&stream, base::clock::now());
        Body::new(Self { stream, watch, _held: held })
    }
}

impl<H: Unpin> http_body::Body for Incoming<H> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = self.stream.lock().poll_frame(cx);
        match &polled {
            Poll::Ready(_) => self.watch.took(base::clock::now()),
            Poll::Pending => self.watch.waiting(),
        }
        polled.map_err(Status::from)
    }

    fn is_end_stream(&self) -> bool {
        let stream = self.stream.lock();
        stream.taken.is_none() && stream.body.as_ref().is_ok_and(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &*self.stream.lock() {
            Stream { body: Ok(body), taken: None } => body.size_hint(),
            _ => SizeHint::default(),
        }
    }
}
