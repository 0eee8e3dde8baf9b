package disk

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// The control protocol: one JSON object a line in each direction. The answer to
// "log" is followed by the log in the format of dm-log-writes.
type request struct {
	Do    string `json:"do"`
	Text  string `json:"text,omitempty"`
	Lite  bool   `json:"lite,omitempty"`
	From  int    `json:"from,omitempty"`
	Fault *Fault `json:"fault,omitempty"`
}

type response struct {
	Error   string  `json:"error,omitempty"`
	Number  int     `json:"number,omitempty"`
	Stats   *Stats  `json:"stats,omitempty"`
	Touched []Range `json:"touched,omitempty"`
}

func acceptControl(l net.Listener, rec *recorder) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go answerControl(c, rec)
	}
}

// answerControl serves one connection until it ends.
func answerControl(c net.Conn, rec *recorder) {
	defer c.Close()
	in := json.NewDecoder(c)
	out := bufio.NewWriter(c)
	for {
		var req request
		if err := in.Decode(&req); err != nil {
			return
		}
		var log []Entry
		resp, err := rec.do(&req, &log)
		if err != nil {
			resp = response{Error: err.Error()}
		}
		if err := json.NewEncoder(out).Encode(resp); err != nil {
			return
		}
		if req.Do == "log" && err == nil {
			if err := Export(out, log); err != nil {
				return
			}
		}
		if err := out.Flush(); err != nil {
			return
		}
	}
}

func (r *recorder) do(req *request, log *[]Entry) (response, error) {
	switch req.Do {
	case "mark":
		n, err := r.mark(req.Text)
		return response{Number: n}, err
	case "stats":
		s := r.snapshot()
		return response{Stats: &s}, nil
	case "inject":
		if req.Fault == nil {
			return response{}, errors.New("inject: no fault given")
		}
		id, err := r.inject(*req.Fault)
		return response{Number: id}, err
	case "heal":
		r.heal()
		return response{}, nil
	case "reset":
		r.reset(req.Lite)
		return response{}, nil
	case "touched":
		return response{Touched: r.takeTouched()}, nil
	case "log":
		all := r.entries()
		if req.From < 0 || req.From > len(all) {
			return response{}, fmt.Errorf("log from %d: there are %d entries", req.From, len(all))
		}
		*log = all[req.From:]
		return response{Number: len(*log)}, nil
	}
	return response{}, fmt.Errorf("unknown request %q", req.Do)
}

// Control sends requests to the server of a disk. It may be used from several
// goroutines, and from processes other than the one that started the disk.
type Control struct {
	mu   sync.Mutex
	conn net.Conn
	in   *bufio.Reader
}

// Dial connects to the control socket of a disk (see Disk.Socket).
func Dial(socket string) (*Control, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("dial disk: %w", err)
	}
	return &Control{conn: conn, in: bufio.NewReaderSize(conn, 1<<20)}, nil
}

// Hangup closes the connection. The disk goes on.
func (c *Control) Hangup() error { return c.conn.Close() }

func (c *Control) roundTrip(req request, more func(io.Reader) error) (response, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var resp response
	b, err := json.Marshal(req)
	if err != nil {
		return resp, err
	}
	if _, err := c.conn.Write(append(b, '\n')); err != nil {
		return resp, fmt.Errorf("disk: %s: %w", req.Do, err)
	}
	line, err := c.in.ReadBytes('\n')
	if err != nil {
		return resp, fmt.Errorf("disk: %s: %w", req.Do, err)
	}
	if err := json.Unmarshal(line, &resp); err != nil {
		return resp, fmt.Errorf("disk: %s: %w", req.Do, err)
	}
	if resp.Error != "" {
		return resp, fmt.Errorf("disk: %s", resp.Error)
	}
	if more != nil {
		if err := more(c.in); err != nil {
			return resp, fmt.Errorf("disk: %s: %w", req.Do, err)
		}
	}
	return resp, nil
}

// Mark appends a mark to the log and returns its index. When Mark returns,
// every request that the disk has answered before stands in front of it.
func (c *Control) Mark(text string) (int, error) {
	resp, err := c.roundTrip(request{Do: "mark", Text: text}, nil)
	return resp.Number, err
}

// Stats returns the counts since the start or the last Reset.
func (c *Control) Stats() (Stats, error) {
	resp, err := c.roundTrip(request{Do: "stats"}, nil)
	if err != nil {
		return Stats{}, err
	}
	return *resp.Stats, nil
}

// Inject arms a fault and returns its number.
func (c *Control) Inject(f Fault) (int, error) {
	resp, err := c.roundTrip(request{Do: "inject", Fault: &f}, nil)
	return resp.Number, err
}

// Heal disarms all faults.
func (c *Control) Heal() error {
	_, err := c.roundTrip(request{Do: "heal"}, nil)
	return err
}

// Reset forgets the log and the counts; the image stays as it is. From here on
// everything is recorded.
func (c *Control) Reset() error {
	_, err := c.roundTrip(request{Do: "reset"}, nil)
	return err
}

// Watch forgets the log and the counts, and from here on remembers only which
// places were written, for Touched.
func (c *Control) Watch() error {
	_, err := c.roundTrip(request{Do: "reset", Lite: true}, nil)
	return err
}

// Touched returns the places written since Watch or the last Touched.
func (c *Control) Touched() ([]Range, error) {
	resp, err := c.roundTrip(request{Do: "touched"}, nil)
	return resp.Touched, err
}

// Log returns the log from entry number from on.
func (c *Control) Log(from int) ([]Entry, error) {
	var log []Entry
	_, err := c.roundTrip(request{Do: "log", From: from}, func(r io.Reader) (err error) {
		log, err = Import(r)
		return err
	})
	return log, err
}
