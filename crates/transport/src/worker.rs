//! Workers: single-threaded runtimes that share nothing but ports.
//!
//! One thread per worker, each with its own tokio runtime, measured at half the CPU per call of one multi-threaded
//! runtime. What a worker starts, it owns: [`Worker::finish`] waits for it before the thread ends.

use std::{io, sync::Arc, thread, time::Duration};

use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Pool, h3::Code};

/// How long the other ends of QUIC connections are given to hear of their end.
const GOOD_BYE: Duration = Duration::from_secs(1);

/// What the code running on a worker knows of it. Cloneable; it stays on its thread.
#[derive(Clone, Debug)]
pub struct Worker {
    /// 0, 1, 2, …: also the first byte of every QUIC connection identifier of this worker.
    pub index: u8,
    /// How many workers the node has.
    pub count: u8,
    /// The tasks that serve: connections that came in and their calls.
    pub tasks: TaskTracker,
    /// The tasks of connections this worker made.
    pub outgoing: TaskTracker,
    /// Cancelled when the node begins to drain: take nothing new, finish what is there.
    pub drain: CancellationToken,
    /// Cancelled when time is up: what is still running is dropped.
    pub stop: CancellationToken,
    /// Its QUIC endpoints, which say good-bye when it stops.
    pub endpoints: Endpoints,
}

/// The QUIC endpoints of a worker. Cloneable.
#[derive(Clone, Debug, Default)]
pub struct Endpoints(Arc<Mutex<Vec<quinn::Endpoint>>>);

impl Endpoints {
    pub(crate) fn add(&self, endpoint: &quinn::Endpoint) {
        self.0.lock().push(endpoint.clone());
    }

    /// Closes every connection, and waits until the other ends can know, at most a second.
    pub(crate) async fn close(&self) {
        let endpoints = std::mem::take(&mut *self.0.lock());
        for endpoint in &endpoints {
            endpoint.close(Code::NO_ERROR.into(), b"stopped");
        }
        let gone = async {
            for endpoint in &endpoints {
                endpoint.wait_idle().await;
            }
        };
        drop(tokio::time::timeout(GOOD_BYE, gone).await);
    }
}

impl Worker {
    /// Worker `index` of `count`, which nothing runs on yet.
    #[must_use]
    pub fn new(index: u8, count: u8, drain: CancellationToken, stop: CancellationToken) -> Self {
        Self {
            index,
            count,
            tasks: TaskTracker::new(),
            outgoing: TaskTracker::new(),
            drain,
            stop,
            endpoints: Endpoints::default(),
        }
    }

    /// Waits for the calls that came in, then closes the connections in `pools` and waits for those.
    pub async fn finish(&self, pools: &[Pool]) {
        self.tasks.close();
        self.tasks.wait().await;
        for pool in pools {
            pool.close();
        }
        self.outgoing.close();
        self.outgoing.wait().await;
        for pool in pools {
            pool.closed().await;
        }
    }
}

/// The running workers of a node.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<thread::JoinHandle<()>>,
    drain: CancellationToken,
    stop: CancellationToken,
}

impl Workers {
    /// Starts `count` workers; each runs `main`, which ends after [`Worker::drain`] and when its tasks are done, or is
    /// dropped at [`Worker::stop`].
    ///
    /// # Errors
    /// When the kernel refuses a thread or the resources of a runtime.
    pub fn start<F, M>(count: u8, main: M) -> io::Result<Self>
    where
        M: Fn(Worker) -> F + Clone + Send + 'static,
        F: Future<Output = ()>,
    {
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        let mut threads = Vec::with_capacity(count.into());
        for index in 0..count {
            let worker = Worker::new(index, count, drain.clone(), stop.clone());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let main = main.clone();
            let body = move || {
                let (stop, endpoints) = (worker.stop.clone(), worker.endpoints.clone());
                runtime.block_on(async move {
                    tokio::select! {
                        () = main(worker) => {}
                        () = stop.cancelled() => endpoints.close().await,
                    }
                });
                // What is left ends with the runtime: TCP connections too. A name that is being looked up is not waited for.
                runtime.shutdown_background();
            };
            threads.push(thread::Builder::new().name(format!("worker-{index}")).spawn(body)?);
        }
        Ok(Self { threads, drain, stop })
    }

    /// Asks every worker to take nothing new and finish what is there.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Ends what is left, and waits for the threads.
    pub fn stop(self) {
        self.drain.cancel();
        self.stop.cancel();
        self.join();
    }

    /// Waits for the threads; call [`Workers::drain`] first. Blocks.
    pub fn join(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }

    /// A handle that ends what is left, from elsewhere.
    #[must_use]
    pub fn stopper(&self) -> CancellationToken {
        self.stop.clone()
    }
}
