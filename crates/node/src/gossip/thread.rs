//! The thread of the gossip port: a runtime of its own, so that neither calls nor scrapes nor whatever else runs in this process
//! delay a heartbeat.

use std::{future::Future, io};

use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
};

/// A runtime that is not started yet. What needs one before, such as a socket, is made in [`Self::enter`].
#[derive(Debug)]
pub(crate) struct Thread(Option<Runtime>);

impl Thread {
    /// # Errors
    /// The kernel gives no more descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Some(Builder::new_current_thread().enable_all().build()?)))
    }

    /// Makes something that belongs to the runtime.
    pub(crate) fn enter<T>(&self, make: impl FnOnce() -> T) -> T {
        let _guard = self.0.as_ref().map(Runtime::enter);
        make()
    }

    /// Runs `task` there to its end, which is told.
    ///
    /// # Errors
    /// The kernel gives no more threads.
    pub(crate) fn run<F>(mut self, task: F) -> io::Result<oneshot::Receiver<()>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (ended, end) = oneshot::channel();
        std::thread::Builder::new().name("isobar-gossip".to_owned()).spawn(move || {
            let Some(runtime) = self.0.take() else { return };
            runtime.block_on(task);
            // Names that are being looked up are not waited for.
            runtime.shutdown_background();
            // Whoever started it may be gone.
            ended.send(()).ok();
        })?;
        Ok(end)
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        time::Duration,
    };

    use base::clock;

    use super::*;

    #[tokio::test]
    async fn what_runs_there_goes_on_while_the_runtime_it_was_started_from_is_busy() {
        let beats = Arc::new(AtomicU32::new(0));
        let beating = beats.clone();
        let thread = Thread::new().unwrap();
        let ended = thread.run(async move {
            while beating.fetch_add(1, Ordering::Relaxed) < 20 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let until = clock::now() + Duration::from_secs(20);
        while beats.load(Ordering::Relaxed) < 10 && clock::now() < until {
            std::hint::spin_loop();
        }
        assert!(beats.load(Ordering::Relaxed) >= 10, "it waits for this thread");
        tokio::time::timeout(Duration::from_secs(20), ended.unwrap()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn one_that_is_never_run_is_given_up_wherever_it_is_dropped() {
        drop(Thread::new().unwrap());
    }
}
