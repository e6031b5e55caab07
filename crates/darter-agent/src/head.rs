//! The head of one HTTP/1.1 request, as the mirror and the exchange between nodes need it.
//!
//! Both speak HTTP themselves, with two methods and no request bodies, because that is what lets them
//! hand a file to the kernel (`mirror::send`), write large blocks and decide how a connection ends.
//! The syntax is httparse's, which hyper uses too. Pure.

use darter_core::swarm::token;

/// Bytes of a request head. containerd's are under 1 KiB, plus at most a few KiB of credential.
pub const HEAD_MAX: usize = 16 * 1024;
/// Header lines of a request. containerd sends about ten.
const HEADERS_MAX: usize = 64;

/// GET or HEAD: a pull needs no other method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Get,
    Head,
    Other,
}

/// One request head. Texts are copies: the buffer is used again for the next request.
#[derive(Clone)]
pub struct Head {
    pub method: Method,
    /// Path and query, without scheme and host where a client sent them.
    pub target: String,
    pub range: Option<String>,
    pub if_range: Option<String>,
    pub if_none_match: Option<String>,
    /// A credential: never to be logged, which is why this type has no Debug.
    pub authorization: Option<String>,
    pub user_agent: Option<String>,
    /// The right to read a blob from this node, of another node's exchange: a secret too.
    pub token: Option<String>,
    /// The client wants the connection closed after the answer, or cannot do otherwise.
    pub close: bool,
    /// A body follows, which nothing that a pull sends has.
    pub has_body: bool,
}

/// What is in the buffer.
pub enum Parsed {
    /// A whole head, and where in the buffer it ends.
    Whole(Box<Head>, usize),
    /// Not all of it yet.
    Partial,
    /// Not HTTP, or more of it than is taken: the status to answer with.
    Broken(u16),
}

/// Reads a head from the start of `buffer`.
pub fn parse(buffer: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let end = match request.parse(buffer) {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) if buffer.len() < HEAD_MAX => return Parsed::Partial,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => return Parsed::Broken(431),
        Err(httparse::Error::Version) => return Parsed::Broken(505),
        Err(_) => return Parsed::Broken(400),
    };
    let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
        return Parsed::Broken(400);
    };
    let mut head = Head {
        method: match method {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            _ => Method::Other,
        },
        target: origin_form(target).to_owned(),
        range: None,
        if_range: None,
        if_none_match: None,
        authorization: None,
        user_agent: None,
        token: None,
        close: version == 0,
        has_body: false,
    };
    for header in request.headers.iter() {
        // Bytes past ASCII are legal in a header and in none that matters here.
        let Ok(value) = std::str::from_utf8(header.value) else { continue };
        if head.take(header.name, value).is_err() {
            return Parsed::Broken(400);
        }
    }
    Parsed::Whole(Box::new(head), end)
}

impl Head {
    /// Notes one header. `Err`: it contradicts what was there, as in request smuggling.
    fn take(&mut self, name: &str, value: &str) -> Result<(), ()> {
        let slot = match name.to_ascii_lowercase().as_str() {
            "range" => &mut self.range,
            "if-range" => &mut self.if_range,
            "if-none-match" => &mut self.if_none_match,
            "authorization" => &mut self.authorization,
            "user-agent" => &mut self.user_agent,
            token::HEADER => &mut self.token,
            "connection" => {
                self.close |= value.split(',').any(|word| word.trim().eq_ignore_ascii_case("close"));
                return Ok(());
            }
            "transfer-encoding" => {
                self.has_body = true;
                return Ok(());
            }
            "content-length" => {
                self.has_body |= value.trim() != "0";
                return Ok(());
            }
            _ => return Ok(()),
        };
        if slot.replace(value.to_owned()).is_some() { Err(()) } else { Ok(()) }
    }
}

/// `http://127.0.0.1:4001/v2/` as a proxy's client sends it, without scheme and host.
fn origin_form(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else { return target };
    rest.find('/').map_or("/", |slash| &rest[slash..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(text: &str) -> Head {
        match parse(text.as_bytes()) {
            Parsed::Whole(head, end) => {
                assert_eq!(end, text.len());
                *head
            }
            Parsed::Partial => panic!("partial: {text}"),
            Parsed::Broken(status) => panic!("{status}: {text}"),
        }
    }

    fn status(text: &[u8]) -> Option<u16> {
        match parse(text) {
            Parsed::Broken(status) => Some(status),
            _ => None,
        }
    }

    #[test]
    fn the_headers_of_a_pull_are_read() {
        let head = whole(
            "GET /v2/a/blobs/x?ns=r HTTP/1.1\r\nHost: 127.0.0.1:4001\r\nrange: bytes=0-\r\n\
             User-Agent: containerd/2.2.4\r\nConnection: keep-alive, Close\r\nContent-Length: 0\r\n\r\n",
        );
        assert_eq!((head.method, head.target.as_str()), (Method::Get, "/v2/a/blobs/x?ns=r"));
        assert_eq!(head.range.as_deref(), Some("bytes=0-"));
        assert_eq!(head.user_agent.as_deref(), Some("containerd/2.2.4"));
        assert!(head.close && !head.has_body);
    }

    #[test]
    fn an_absolute_target_and_an_old_version_are_understood() {
        let head = whole("HEAD http://127.0.0.1:4001/v2/ HTTP/1.0\r\n\r\n");
        assert_eq!((head.method, head.target.as_str(), head.close), (Method::Head, "/v2/", true));
        assert_eq!(whole("GET http://host HTTP/1.1\r\n\r\n").target, "/");
    }

    #[test]
    fn what_is_not_a_request_of_a_pull_has_its_status() {
        assert_eq!(status(b"\x16\x03\x01\x02\x00\x01\x00"), Some(400), "TLS on the plain port");
        assert_eq!(status(b"GET / HTTP/3.0\r\n\r\n"), Some(505));
        assert_eq!(status(b"GET / HTTP/1.1\r\nRange: a\r\nRange: b\r\n\r\n"), Some(400), "which of the two?");
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS_MAX + 1));
        assert_eq!(status(many.as_bytes()), Some(431));
        let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(HEAD_MAX));
        assert_eq!(status(long.as_bytes()), Some(431));
        assert!(whole("POST /v2/ HTTP/1.1\r\nContent-Length: 5\r\n\r\n").has_body);
        assert!(whole("GET /v2/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").has_body);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_head_that_comes_in_parts_is_partial_until_it_is_whole(cut in 0usize..60) {
            let text = b"GET /v2/ HTTP/1.1\r\nHost: x\r\nUser-Agent: containerd/1.6\r\n\r\n";
            prop_assert!(matches!(parse(&text[..cut.min(text.len() - 1)]), Parsed::Partial));
        }
    }
}
