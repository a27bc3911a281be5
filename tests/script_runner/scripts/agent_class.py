"""Reinforcement learning as people start it: a DQN agent class, replay memory, a target network, single-state calls."""
import random
from collections import deque

import numpy as np
import torch
import torch.nn as nn


class Corridor:
    """Walk right to the end of a corridor of six cells."""

    def reset(self):
        self.at = 0
        return self._state()

    def _state(self):
        s = np.zeros(6, dtype=np.float32)
        s[self.at] = 1
        return s

    def step(self, action):
        self.at = max(0, min(5, self.at + (1 if action else -1)))
        return self._state(), 1.0 if self.at == 5 else -0.1, self.at == 5


class DQNAgent:
    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy_net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2)).to(self.device)
        self.target_net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2)).to(self.device)
        self.target_net.load_state_dict(self.policy_net.state_dict())
        self.target_net.eval()
        self.optimizer = torch.optim.Adam(self.policy_net.parameters(), lr=0.01)
        self.memory = deque(maxlen=500)
        self.epsilon = 0.5

    def act(self, state):
        if random.random() < self.epsilon:
            return random.randrange(2)
        with torch.no_grad():
            return self.policy_net(torch.from_numpy(state).unsqueeze(0).to(self.device)).max(1)[1].item()

    def learn(self, batch_size=21, gamma=0.9):
        if len(self.memory) < batch_size:
            return None
        s, a, r, s2, done = zip(*random.sample(self.memory, batch_size))
        s, s2 = (torch.from_numpy(np.stack(v)).to(self.device) for v in (s, s2))
        a = torch.tensor(a, device=self.device).unsqueeze(1)
        r, done = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (r, done))
        q = self.policy_net(s).gather(1, a).squeeze(1)
        with torch.no_grad():
            expected = r + gamma * self.target_net(s2).max(1)[0] * (1 - done)
        loss = nn.functional.smooth_l1_loss(q, expected)
        self.optimizer.zero_grad()
        loss.backward()
        for param in self.policy_net.parameters():
            param.grad.data.clamp_(-1, 1)
        self.optimizer.step()
        return loss.item()


random.seed(1)
np.random.seed(1)
torch.manual_seed(1)
env, agent = Corridor(), DQNAgent()
for episode in range(6):
    state, loss, done = env.reset(), None, False
    for _ in range(15):
        action = agent.act(state)
        nxt, reward, done = env.step(action)
        agent.memory.append((state, action, reward, nxt, done))
        state = nxt
        loss = agent.learn()
        if done:
            break
    if episode % 2 == 1:
        agent.target_net.load_state_dict(agent.policy_net.state_dict())
    print(f"episode {episode} steps in memory {len(agent.memory)} loss {loss if loss is None else format(loss, '.9f')}")
