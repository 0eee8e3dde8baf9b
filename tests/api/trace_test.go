package api

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// traceFlags make strace print what parseTrace reads: every thread, descriptors
// with their paths, strings whole and in hex. -D keeps the daemon our child, so
// that stopping it does not go through strace.
var traceFlags = []string{
	"-D", "-f", "-y", "-qq", "-xx", "-s", "1048576", "--seccomp-bpf",
	"-e", "trace=openat,openat2,dup,dup2,dup3,close,syncfs,fdatasync,pwrite64,read,write,writev,recvmsg,sendmsg",
	"-e", "signal=none",
}

// tracedCall is one line of the trace, or two when another thread came between
// them. Its span is from start to end, in line numbers, which is the one
// order strace vouches for.
type tracedCall struct {
	start, end int
	name       string
	fd         string // first argument, as "12</path>"; empty for openat
	data       []byte // the buffer of reads and writes
	result     string // such as "0", "-1 EIO (Input/output error)" or "12</path>"
}

func (c tracedCall) ok() bool { return c.result != "" && !strings.HasPrefix(c.result, "-1") }

// path is what the descriptor of the call refers to.
func (c tracedCall) path() string { return fdPath(c.fd) }

var (
	callLine       = regexp.MustCompile(`^(\d+)\s+(\w+)\((.*)\)\s+= (.+)$`)
	unfinishedLine = regexp.MustCompile(`^(\d+)\s+(\w+)\((.*?),?\s*<unfinished \.\.\.>$`)
	resumedLine    = regexp.MustCompile(`^(\d+)\s+<\.\.\. (\w+) resumed>(.*)\)\s+= (.+)$`)
	ignoredLine    = regexp.MustCompile(`^\d+\s+(\+\+\+|---|\?\?\?\?) |<unfinished \.\.\.>\) += \?$|<detached \.\.\.>$|resumed>.*\)? += \?$`)
	hexString      = regexp.MustCompile(`"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?`)
	fdWithPath     = regexp.MustCompile(`^(\d+)<((?:\\x[0-9a-f]{2})*)>`)
)

// parseTrace reads the output of strace with traceFlags. A line it does not
// understand is an error: what it skips it could not have checked.
func parseTrace(r io.Reader) ([]tracedCall, error) {
	var calls []tracedCall
	open := map[string]tracedCall{} // by thread
	args := map[string]string{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 64<<20)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if m := unfinishedLine.FindStringSubmatch(line); m != nil {
			open[m[1]], args[m[1]] = tracedCall{start: n, name: m[2]}, m[3]
			continue
		}
		if m := resumedLine.FindStringSubmatch(line); m != nil {
			c, found := open[m[1]]
			if !found || c.name != m[2] {
				return nil, fmt.Errorf("trace line %d: %s resumed but not begun", n, m[2])
			}
			delete(open, m[1])
			c.end = n
			if err := c.fill(args[m[1]]+", "+m[3], m[4]); err != nil {
				return nil, fmt.Errorf("trace line %d: %w", n, err)
			}
			calls = append(calls, c)
			continue
		}
		if m := callLine.FindStringSubmatch(line); m != nil {
			c := tracedCall{start: n, end: n, name: m[2]}
			if err := c.fill(m[3], m[4]); err != nil {
				return nil, fmt.Errorf("trace line %d: %w", n, err)
			}
			calls = append(calls, c)
			continue
		}
		if !ignoredLine.MatchString(line) {
			return nil, fmt.Errorf("trace line %d: not understood: %.200s", n, line)
		}
	}
	return calls, lines.Err()
}

func (c *tracedCall) fill(args, result string) error {
	c.result = result
	if m := fdWithPath.FindStringSubmatch(result); m != nil {
		c.result = m[1] + "<" + unhex(m[2]) + ">"
	}
	if m := fdWithPath.FindStringSubmatch(args); m != nil {
		c.fd = m[1] + "<" + unhex(m[2]) + ">"
		args = args[len(m[0]):]
	}
	switch c.name {
	case "read", "write", "pwrite64":
		if !c.ok() || c.result == "0" {
			return nil
		}
		m := hexString.FindStringSubmatch(args)
		if m == nil {
			return fmt.Errorf("%s without a buffer: %.100s", c.name, args)
		}
		if m[2] != "" {
			return fmt.Errorf("%s cut short by strace", c.name)
		}
		c.data = []byte(unhex(m[1]))
		if n, err := strconv.Atoi(c.result); err == nil && n < len(c.data) {
			c.data = c.data[:n]
		}
	case "writev", "recvmsg", "sendmsg":
		// Go's net and grpc use read and write here. Were that to change, the
		// replies would go unseen and every check would pass.
		return fmt.Errorf("unexpected %s on %s", c.name, c.fd)
	}
	return nil
}

func unhex(s string) string {
	b, err := hex.DecodeString(strings.ReplaceAll(s, `\x`, ""))
	if err != nil {
		return s
	}
	return string(b)
}

func fdPath(fd string) string {
	_, path, _ := strings.Cut(strings.TrimSuffix(fd, ">"), "<")
	return path
}

// rpc is one gRPC call as it went over the daemon's socket.
type rpc struct {
	request   string // the message, still encoded; names and keys stand in it as they are
	requested int    // line at which the daemon had read all of it
	reply     string
	answered  int // line at which the daemon began to write the end of the reply
}

const (
	http2Data    = 0
	http2Headers = 1
	endStream    = 1
	http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

// stream is a half of a connection of which part has been taken apart.
type stream struct{ rest []byte }

// frames takes whole HTTP/2 frames off the stream.
func (s *stream) frames(data []byte, each func(kind, flags byte, id uint32, body []byte)) {
	s.rest = append(s.rest, data...)
	if strings.HasPrefix(string(s.rest), http2Preface) {
		s.rest = s.rest[len(http2Preface):]
	}
	for len(s.rest) >= 9 {
		size := int(s.rest[0])<<16 | int(s.rest[1])<<8 | int(s.rest[2])
		if len(s.rest) < 9+size {
			return
		}
		id := binary.BigEndian.Uint32(s.rest[5:9]) & 0x7fffffff
		each(s.rest[3], s.rest[4], id, s.rest[9:9+size])
		s.rest = s.rest[9+size:]
	}
}

// rpcs finds the gRPC calls in the reads and writes on sockets. Connections are
// distinguished by the socket's inode, which -y shows.
func rpcs(calls []tracedCall) []*rpc {
	halves := map[string]*stream{}
	byStream := map[string]*rpc{}
	var all []*rpc
	for _, c := range calls {
		socket := c.path()
		if !c.ok() || c.data == nil || !strings.HasPrefix(socket, "socket:") {
			continue
		}
		half := halves[socket+c.name]
		if half == nil {
			half = &stream{}
			halves[socket+c.name] = half
		}
		half.frames(c.data, func(kind, flags byte, id uint32, body []byte) {
			key := fmt.Sprint(socket, id)
			switch {
			case id == 0:
			case c.name == "read" && kind == http2Headers:
				byStream[key] = &rpc{}
				all = append(all, byStream[key])
			case byStream[key] == nil:
			case c.name == "read" && kind == http2Data:
				byStream[key].request += string(body)
				byStream[key].requested = c.end
			case c.name == "write" && kind == http2Data:
				byStream[key].reply += string(body)
			case c.name == "write" && kind == http2Headers && flags&endStream != 0:
				byStream[key].answered = c.start
			}
		})
	}
	return all
}
