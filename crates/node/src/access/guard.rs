//! A request that goes on only as long as every model it names is one its tenant may call.
//!
//! The first name has been judged when the call was routed; this judges the rest, before an engine gets the piece it is in.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use base::TenantName;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use inference::{Encoding, ModelWatch, kserve_model_field};
use tonic::{Status, body::Body};

use super::Tenant;
use crate::refusal::Refusal;

/// Why a request was ended on its way, if it was.
#[derive(Clone, Debug, Default)]
pub(crate) struct Forbidden(Arc<OnceLock<(TenantName, String)>>);

impl Forbidden {
    /// What the caller is told.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let (tenant, what) = self.0.get()?;
        Some(Refusal::NotAllowed { tenant: tenant.clone(), what: what.clone() })
    }
}

/// The body of a call to `path` that `tenant` may make for some models.
pub(crate) fn guard(
    path: &str,
    headers: &HeaderMap,
    body: Body,
    tenant: Arc<Tenant>,
) -> (Body, Forbidden) {
    let forbidden = Forbidden::default();
    // Rules that name models cover no other methods.
    let Some(field) = kserve_model_field(path) else { return (body, forbidden) };
    let encoding = Encoding::from_header(headers.get("grpc-encoding").map(|v| v.as_bytes()));
    let watch = ModelWatch::new(field, encoding);
    let guarded =
        Guarded { body, watch, tenant, path: path.to_owned(), forbidden: forbidden.clone() };
    (Body::new(guarded), forbidden)
}

#[derive(Debug)]
struct Guarded {
    body: Body,
    watch: ModelWatch,
    tenant: Arc<Tenant>,
    path: String,
    forbidden: Forbidden,
}

impl Guarded {
    /// What of `data` the tenant may not call.
    fn judge(&mut self, data: &Bytes) -> Result<(), String> {
        let names = self.watch.push(data);
        let names = names.map_err(|error| format!("a model that cannot be read ({error})"))?;
        match names.iter().find(|model| !self.tenant.may_call_model(&self.path, model)) {
            Some(model) => Err(format!("model {model}")),
            None => Ok(()),
        }
    }
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref().cloned());
        if let Some(data) = data
            && let Err(what) = self.judge(&data)
        {
            let status = Status::permission_denied(format!("the tenant may not call {what}"));
            // It can be set once, and is.
            drop(self.forbidden.0.set((self.tenant.name().clone(), what)));
            return Poll::Ready(Some(Err(status)));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
