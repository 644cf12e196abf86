//! How pressed a server is, out of band: reports at an interval, for whoever balances over nodes and is not in the path of
//! calls. They say what the trailers of replies say.
//!
//! On the ports for clients they are about the node, all it can reach; on the port for peers about the engines here.
//! Source: gRFC A51, xds.service.orca.v3.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use proto::xds::{
    data::orca::v3::OrcaLoadReport,
    service::orca::v3::{OrcaLoadReportRequest, open_rca_service_server::OpenRcaService},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, codegen::BoxStream};

use crate::{orca, router::Router};

/// Streams of reports a node keeps up at once, over all ports. Further ones are refused.
pub(crate) const STREAMS_MAX: usize = 256;
/// Time between reports: at least, at most, and for who does not say.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(3_600);
const INTERVAL_DEFAULT: Duration = Duration::from_secs(30);

/// Reports. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Reports {
    /// Over what they are about.
    pub(crate) router: Router,
    /// One permit per stream.
    pub(crate) streams: Arc<Semaphore>,
    /// Ends them.
    pub(crate) drain: CancellationToken,
}

/// A stream in progress.
struct Reporting {
    reports: Reports,
    interval: Duration,
    is_first: bool,
    _place: OwnedSemaphorePermit,
}

impl Reporting {
    /// The next report: the first at once, each other after the interval; `None`: the node drains.
    async fn next(mut self) -> Option<(Result<OrcaLoadReport, Status>, Self)> {
        if !std::mem::take(&mut self.is_first) {
            tokio::select! {
                biased;
                () = self.reports.drain.cancelled() => return None,
                () = tokio::time::sleep(self.interval) => {}
            }
        }
        let report = orca::report(&self.reports.router.all_loads());
        Some((Ok(report), self))
    }
}

#[tonic::async_trait]
impl OpenRcaService for Reports {
    async fn stream_core_metrics(
        &self,
        request: Request<OrcaLoadReportRequest>,
    ) -> Result<Response<BoxStream<OrcaLoadReport>>, Status> {
        // Nothing is said of costs, so which of them are asked for does not matter.
        let interval = interval(request.get_ref());
        let place = self.streams.clone().try_acquire_owned().map_err(|_| {
            let why = "this node keeps up as many streams of load reports as it may";
            Status::resource_exhausted(format!("{why} ({STREAMS_MAX}): ask another, or less often"))
        })?;
        let reports = self.clone();
        let start = Reporting { reports, interval, is_first: true, _place: place };
        Ok(Response::new(stream::unfold(start, Reporting::next).boxed()))
    }
}

/// How often a caller wants to hear, within the bounds. One that does not say, or nothing that makes sense, hears seldom.
fn interval(request: &OrcaLoadReportRequest) -> Duration {
    let asked = request.report_interval.and_then(|asked| Duration::try_from(asked).ok());
    let asked = asked.filter(|asked| !asked.is_zero()).unwrap_or(INTERVAL_DEFAULT);
    asked.clamp(INTERVAL_MIN, INTERVAL_MAX)
}

#[cfg(test)]
mod tests {
    use balance::RetryBudget;
    use base::clock;
    use futures_util::FutureExt as _;
    use parking_lot::Mutex;
    use prost_types::Duration as Asked;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::readiness::Readiness;
    use crate::{engines::Engines, peers::Peers};

    fn reports(streams: usize) -> Reports {
        let budget = Arc::new(Mutex::new(RetryBudget::new(clock::now())));
        let engines = Engines::new(std::iter::empty());
        let rng = StdRng::seed_from_u64(1);
        Reports {
            router: Router::new(
                engines,
                Peers::none("spiffe://mesh.test/node/eu/a".parse().unwrap()),
                Readiness::of_one(),
                rng,
                budget,
            ),
            streams: Arc::new(Semaphore::new(streams)),
            drain: CancellationToken::new(),
        }
    }

    fn ask(seconds: i64, nanos: i32) -> OrcaLoadReportRequest {
        let report_interval = Some(Asked { seconds, nanos });
        OrcaLoadReportRequest { report_interval, ..OrcaLoadReportRequest::default() }
    }

    #[test]
    fn an_interval_is_kept_within_bounds() {
        assert_eq!(interval(&OrcaLoadReportRequest::default()), INTERVAL_DEFAULT);
        assert_eq!(interval(&ask(2, 500_000_000)), Duration::from_millis(2_500));
        assert_eq!(interval(&ask(0, 1)), INTERVAL_MIN);
        assert_eq!(interval(&ask(i64::MAX, 0)), INTERVAL_MAX);
        for odd in [ask(0, 0), ask(-5, 0)] {
            assert_eq!(interval(&odd), INTERVAL_DEFAULT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn reports_come_at_once_and_at_the_interval_until_the_node_drains() {
        let service = reports(1);
        let reply = service.stream_core_metrics(Request::new(ask(1, 0))).await.unwrap();
        let mut stream = reply.into_inner();
        assert!(stream.next().now_or_never().unwrap().unwrap().is_ok());
        for _ in 0..2 {
            let early = tokio::time::timeout(Duration::from_millis(999), stream.next()).await;
            assert!(early.is_err());
            let due = tokio::time::timeout(Duration::from_millis(2), stream.next()).await;
            assert!(due.unwrap().unwrap().is_ok());
        }
        service.drain.cancel();
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_too_many_is_refused_until_another_ends() {
        let service = reports(1);
        let first = service.stream_core_metrics(Request::new(ask(1, 0))).await.unwrap();
        let refused = service.stream_core_metrics(Request::new(ask(1, 0))).await;
        assert_eq!(refused.err().map(|status| status.code()), Some(tonic::Code::ResourceExhausted));
        drop(first);
        assert!(service.stream_core_metrics(Request::new(ask(1, 0))).await.is_ok());
    }
}
